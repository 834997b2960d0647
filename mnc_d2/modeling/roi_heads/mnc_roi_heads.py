"""Stages 2 to 1 + 2k: k passes of mask regression and masked-feature classification (sections 3.2 to 4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads, build_box_head, build_mask_head
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from ..causal_gradients import CausalGradients
from ..mask_voting import vote_masks
from ..poolers import RoIWarpPooler
from ..roi_anchors import RoIAnchorLoss
from .classifier import MNCOutputLayers
from .mask_head import MaskTargets, instance_mask_iou, mask_loss, mask_targets, warp_mask_targets
from .metrics import log_metrics, masked_mean, recall
from .outputs import PassOutput, gather_by_image
from .sampling import label_boxes, sample_rois


@ROI_HEADS_REGISTRY.register()
class MNCROIHeads(ROIHeads):
    """The cascade after the RPN: each pass regresses a mask in every box, then classifies the box and its mask.

    The boxes of a pass are those that the pass before regressed. All passes share their weights, or each has its own.
    """

    # Of mask voting, see vote_masks.
    voting_sampling = "center"

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        pooler: RoIWarpPooler,
        mask_head: nn.Module,
        mask_path_head: nn.Module,
        box_path_head: nn.Module,
        predictor: MNCOutputLayers,
        classifier_resolution: int,
        num_passes_train: int = 2,
        num_passes_test: int = 2,
        gradients: CausalGradients | None = None,
        append_gt_to_later_passes: bool = False,
        background_bands: list[tuple[float, float]] = ((0.1, 0.5), (0.0, 0.1)),
        background_fractions: list[float] = (0.85, 0.15),
        mask_target_threshold: float = 0.5,
        mask_threshold: float = 0.4,
        mask_iou_threshold: float = 0.5,
        mask_loss_weight: float = 1.0,
        next_box_background: bool = True,
        voting_iou_threshold: float = 0.5,
        detection_box: str = "regressed",
        mask_on: bool = True,
        mask_in_features: list[str] | None = None,
        next_pass_min_score: float = 0.0,
        roi_anchor_loss: nn.Module | None = None,
        refill_background: bool = True,
        **kwargs,
    ) -> None:
        """
        The four heads are modules that all passes share, or a ModuleList each, with one module per pass; passes beyond
        its length take the last.

        Args:
            in_features: names of the feature maps to pool from.
            pooler: RoI warp to S x S.
            mask_head: pooled features (R, C, S, S) -> mask logits (R, m, m).
            mask_path_head, box_path_head: box heads for the masked and for the plain features, each from
                (R, C, s, s) with s = ``classifier_resolution`` to features that are concatenated, the mask path first.
            predictor: joint features -> scores, mask-level scores, box deltas.
            classifier_resolution: s, a divisor of S; the features are max-pooled from S x S to s x s.
            num_passes_train, num_passes_test: k for training and for inference.
            gradients: which gradients flow from a stage to those before it; the defaults of
                :class:`~mnc_d2.modeling.causal_gradients.CausalGradients` by default.
            background_bands, background_fractions, refill_background: see
                :func:`~mnc_d2.modeling.roi_heads.sampling.sample_rois`.
            mask_target_threshold, mask_threshold, mask_iou_threshold, mask_loss_weight, next_box_background,
                next_pass_min_score, voting_iou_threshold, detection_box, append_gt_to_later_passes: see
                :func:`mnc_d2.add_mnc_config`.
            mask_on: whether inference returns masks, by mask voting; if not, boxes only, scored at box level.
            mask_in_features: names of the feature maps that the mask head pools from; by default ``in_features``.
            roi_anchor_loss: a :class:`~mnc_d2.modeling.roi_anchors.RoIAnchorLoss` that is added to the losses.
            kwargs: those of Detectron2's ``ROIHeads``.
        """
        super().__init__(**kwargs)
        if detection_box not in ("tight", "regressed"):
            raise ValueError(f'MODEL.MNC.DETECTION_BOX must be "tight" or "regressed", got {detection_box!r}')
        if num_passes_train < 1 or num_passes_test < 1:
            raise ValueError("MODEL.MNC.NUM_PASSES_TRAIN and NUM_PASSES_TEST must be at least 1")
        if pooler.output_size % classifier_resolution:
            raise ValueError(
                f"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION ({classifier_resolution}) must divide "
                f"MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION ({pooler.output_size})"
            )
        self.in_features = in_features
        self.pooler = pooler
        self.mask_head = mask_head
        self.mask_path_head = mask_path_head
        self.box_path_head = box_path_head
        self.predictor = predictor
        self.classifier_resolution = classifier_resolution
        self.num_passes_train = num_passes_train
        self.num_passes_test = num_passes_test
        self.gradients = gradients or CausalGradients()
        self.append_gt_to_later_passes = append_gt_to_later_passes
        self.background_bands = background_bands
        self.background_fractions = background_fractions
        self.mask_target_threshold = mask_target_threshold
        self.mask_threshold = mask_threshold
        self.mask_iou_threshold = mask_iou_threshold
        self.mask_loss_weight = mask_loss_weight
        self.next_box_background = next_box_background
        self.next_pass_min_score = next_pass_min_score
        self.voting_iou_threshold = voting_iou_threshold
        self.detection_box = detection_box
        self.mask_on = mask_on
        self.mask_in_features = mask_in_features or in_features
        self.roi_anchor_loss = roi_anchor_loss
        self.refill_background = refill_background

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        mnc = cfg.MODEL.MNC
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        pooler = RoIWarpPooler(
            output_size=cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION,
            scales=[1.0 / input_shape[name].stride for name in in_features],
            sampling_ratio=cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO,
            sampling=mnc.ROI_WARP_SAMPLING,
        )
        mask_in_features = mnc.MASK_IN_FEATURES or in_features
        shapes, mask_shapes = ([input_shape[name] for name in names] for names in (in_features, mask_in_features))
        if [(x.stride, x.channels) for x in shapes] != [(x.stride, x.channels) for x in mask_shapes]:
            raise ValueError(
                f"MODEL.MNC.MASK_IN_FEATURES {list(mask_in_features)} must have the strides and channels of "
                f"MODEL.ROI_HEADS.IN_FEATURES {list(in_features)}"
            )
        channels = shapes[0].channels
        size = pooler.output_size
        resolution = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        classifier_shape = ShapeSpec(channels=channels, height=resolution, width=resolution)

        def per_pass(build: Callable[[], nn.Module]) -> nn.Module:
            return build() if mnc.SHARE_PASSES else nn.ModuleList(build() for _ in range(mnc.NUM_PASSES_TRAIN))

        mask_path_head = per_pass(lambda: build_box_head(cfg, classifier_shape))
        box_path_head = per_pass(lambda: build_box_head(cfg, classifier_shape))
        path_shape = _module_of_pass(box_path_head, 0).output_shape
        path_size = path_shape.channels * (path_shape.height or 1) * (path_shape.width or 1)
        return {
            **super().from_config(cfg),
            "in_features": in_features,
            "mask_in_features": mask_in_features,
            "pooler": pooler,
            "mask_head": per_pass(lambda: build_mask_head(cfg, ShapeSpec(channels=channels, height=size, width=size))),
            "mask_path_head": mask_path_head,
            "box_path_head": box_path_head,
            "predictor": per_pass(lambda: MNCOutputLayers(cfg, ShapeSpec(channels=2 * path_size))),
            "classifier_resolution": resolution,
            "num_passes_train": mnc.NUM_PASSES_TRAIN,
            "num_passes_test": mnc.NUM_PASSES_TEST,
            "gradients": CausalGradients.from_config(cfg),
            "append_gt_to_later_passes": mnc.APPEND_GT_TO_LATER_PASSES,
            "background_bands": mnc.BACKGROUND_IOU_BANDS,
            "background_fractions": mnc.BACKGROUND_FRACTIONS,
            "refill_background": mnc.REFILL_BACKGROUND,
            "roi_anchor_loss": RoIAnchorLoss(cfg) if mnc.ROI_ANCHOR_LOSS else None,
            "mask_target_threshold": mnc.MASK_TARGET_THRESHOLD,
            "mask_threshold": mnc.MASK_THRESHOLD,
            "mask_iou_threshold": mnc.MASK_IOU_THRESHOLD,
            "mask_loss_weight": mnc.MASK_LOSS_WEIGHT,
            "next_box_background": mnc.NEXT_BOX_BACKGROUND,
            "next_pass_min_score": mnc.NEXT_PASS_MIN_SCORE,
            "voting_iou_threshold": mnc.VOTING_IOU_THRESHOLD,
            "detection_box": mnc.DETECTION_BOX,
            "mask_on": cfg.MODEL.MASK_ON,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args:
            images: unused.
            features: the backbone's feature maps by name.
            proposals: one per image, with ``proposal_boxes``.
            targets: one per image, in training, with ``gt_boxes``, ``gt_classes``, ``gt_masks`` and, optionally,
                ``gt_has_mask`` (bool; all true if absent).

        Returns:
            In training: the labelled proposals of the first pass, and the losses named by stage.
            In inference: those of :meth:`detect_instances`, or of :meth:`detect_boxes` without ``mask_on``, and no
            losses.
        """
        del images
        boxes = [x.proposal_boxes for x in proposals]
        if not self.training:
            outputs, image_sizes = self.run_passes(features, proposals), [x.image_size for x in proposals]
            detect = self.detect_instances if self.mask_on else self.detect_boxes
            return detect(outputs, image_sizes), {}
        if targets is None:
            raise ValueError("MNCROIHeads needs targets in training")

        features = self.gradients.of_features(features, self.num_passes_train)
        first_proposals, losses = None, {}
        metrics = {f"s1/{name}": value for name, value in recall(boxes, targets).items()}
        for index in range(self.num_passes_train):
            if index == 0:
                if self.proposal_append_gt:
                    boxes = _append_boxes(boxes, targets)
                labelled = first_proposals = self.label_proposals(boxes, targets, sample=True)
                # Other RPNs than CausalRPN, and proposals from files, have no anchors to tell of.
                if self.roi_anchor_loss is not None and all(x.has("anchor_logits") for x in proposals):
                    losses.update(self.roi_anchor_loss(proposals, labelled, self.num_classes))
            else:
                if self.append_gt_to_later_passes:
                    boxes = _append_boxes(boxes, targets)
                labelled = self.label_proposals(boxes, targets, sample=False)
            output, pass_losses, pass_metrics = self._train_pass(index, features, labelled, targets)
            stage = 2 * (index + 1)
            losses.update({f"{name}_s{stage + ('mask' not in name)}": loss for name, loss in pass_losses.items()})
            metrics.update({f"s{stage + ('mask' not in name)}/{name}": value for name, value in pass_metrics.items()})
            if index + 1 < self.num_passes_train:
                boxes = self._next_boxes(output, [x.image_size for x in targets])
        log_metrics(metrics)
        return first_proposals, losses

    def label_proposals(self, boxes: list[Boxes], targets: list[Instances], sample: bool) -> list[Instances]:
        """Match the boxes of each image to its ground truth, see :func:`label_boxes`.

        Args:
            boxes: one per image, in image pixels.
            targets: as in :meth:`forward`.
            sample: whether to draw ``batch_size_per_image`` of the boxes; else all stay, but those labelled ignore.
        """
        sampler = None
        if sample:
            sampler = partial(
                sample_rois,
                num_classes=self.num_classes,
                batch_size=self.batch_size_per_image,
                positive_fraction=self.positive_fraction,
                bands=self.background_bands,
                band_fractions=self.background_fractions,
                refill=self.refill_background,
            )
        return [
            label_boxes(boxes_of_image, target, self.proposal_matcher, self.num_classes, sampler)
            for boxes_of_image, target in zip(boxes, targets)
        ]

    def _train_pass(
        self, index: int, features: dict[str, torch.Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> tuple[PassOutput, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Run one pass on labelled proposals; return its output, its losses and its accuracies."""
        for proposal, boxes in zip(proposals, self.gradients.of_coordinates(proposals, self.num_classes)):
            proposal.proposal_boxes = boxes
        mask_features, pooled = self._pool_in_training(features, [x.proposal_boxes for x in proposals], index)
        logits = _module_of_pass(self.mask_head, index)(mask_features)
        truth = mask_targets(proposals, targets, logits.shape[-1])
        output, losses, metrics = self._train_classifier(index, pooled, logits.sigmoid(), proposals, truth)
        valid = _foreground(proposals, self.num_classes) & truth.has_mask
        if self.gradients.moving_targets and self.gradients.mask_coordinate_gradient:
            target = warp_mask_targets(proposals, targets, logits.shape[-1])
        else:
            target = (truth.coverage >= self.mask_target_threshold).to(logits)
        loss = mask_loss(logits, target, valid, [len(x) for x in proposals])
        return output, {"loss_mask": self.mask_loss_weight * loss, **losses}, metrics

    def _pool_in_training(
        self, features: dict[str, torch.Tensor], boxes: list[Boxes], index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`_pool`; the mask head's features from detached boxes if these pass no gradient there."""
        mask_features, pooled = self._pool(features, boxes, index)
        if not self.gradients.mask_coordinate_gradient and any(x.tensor.requires_grad for x in boxes):
            mask_features, _ = self._pool(features, [Boxes(x.tensor.detach()) for x in boxes], index)
        return mask_features, pooled

    def _train_classifier(
        self, index: int, pooled: torch.Tensor, masks: torch.Tensor, proposals: list[Instances], truth: MaskTargets
    ) -> tuple[PassOutput, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Label masks, and classify features under them.

        Args:
            index: of the pass.
            pooled: (R, C, S, S), features of the proposals.
            masks: (R, m, m), probabilities.
            proposals: labelled, one per image; they are given ``gt_mask_classes``.
            truth: masks of the matched instances.

        Returns:
            the output of the pass, the classifier's losses, and accuracies.
        """
        boxes = [x.proposal_boxes for x in proposals]
        classes = torch.cat([x.gt_classes for x in proposals])
        foreground = _foreground(proposals, self.num_classes)
        box_tensor = torch.cat([x.tensor for x in boxes]).detach()
        mask_ious = instance_mask_iou(masks >= self.mask_threshold, truth.coverage, box_tensor, truth.area)
        # Without a mask to compare to, the mask-level label is the box-level one (mixed supervision).
        mask_foreground = foreground & ((mask_ious >= self.mask_iou_threshold) | ~truth.has_mask)
        mask_classes = classes.masked_fill(~mask_foreground, self.num_classes)
        for proposal, labels in zip(proposals, mask_classes.split([len(x) for x in proposals])):
            proposal.gt_mask_classes = labels

        masks = self.gradients.of_masks(masks, mask_foreground)
        predictions = self._classify(index, pooled, masks)
        losses = _module_of_pass(self.predictor, index).losses(predictions, proposals, self.gradients.moving_targets)
        metrics = {
            "mask_iou": masked_mean(mask_ious, foreground & truth.has_mask),
            "cls_accuracy": masked_mean(predictions[0].argmax(dim=1) == classes),
            "fg_cls_accuracy": masked_mean(predictions[0].argmax(dim=1) == classes, foreground),
            "seg_cls_accuracy": masked_mean(predictions[1].argmax(dim=1) == mask_classes),
            "num_fg": foreground.sum() / len(proposals),
            "num_seg_fg": mask_foreground.sum() / len(proposals),
        }
        return PassOutput(index, boxes, masks, *predictions), losses, metrics

    def _pool(
        self, features: dict[str, torch.Tensor], boxes: list[Boxes], index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features (R, C, S, S) of the boxes for the mask head and for the classifier of a pass."""
        del index  # pooling is the same in all passes
        pooled = self.pooler([features[name] for name in self.in_features], boxes)
        if self.mask_in_features == self.in_features:
            return pooled, pooled
        return self.pooler([features[name] for name in self.mask_in_features], boxes), pooled

    def _classify(
        self, index: int, pooled: torch.Tensor, masks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stage 3: classify features (R, C, S, S) under masks (R, m, m); returns what the predictor does."""
        stride = self.pooler.output_size // self.classifier_resolution
        if masks.shape[-1] != pooled.shape[-1]:
            masks = self._resize_masks(masks, pooled.shape[-1])
        masked = pooled * masks[:, None].to(pooled.dtype)
        mask_path = _module_of_pass(self.mask_path_head, index)(F.max_pool2d(masked, stride))
        box_path = _module_of_pass(self.box_path_head, index)(F.max_pool2d(pooled, stride))
        joint = torch.cat((mask_path.flatten(1), box_path.flatten(1)), dim=1)
        return _module_of_pass(self.predictor, index)(joint)

    def _resize_masks(self, masks: torch.Tensor, size: int) -> torch.Tensor:
        """Resize masks (R, m, m) to the size of the features under them: (R, size, size)."""
        return F.interpolate(masks[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]

    def _next_boxes(self, output: PassOutput, image_sizes: list[tuple[int, int]]) -> list[Boxes]:
        """Regress the boxes of the next pass with the deltas of each box's best class, and clip them to the image."""
        allow_background = self.next_box_background and not self.training
        scores = output.mask_scores if allow_background else output.mask_scores[:, : self.num_classes]
        tensor = torch.cat([x.tensor for x in output.boxes])
        deltas = self.gradients.of_deltas(output.deltas, len(image_sizes))
        regressed = _module_of_pass(self.predictor, output.index).regress_boxes(
            tensor, deltas, scores.detach().argmax(dim=1)
        )
        if not self.gradients.box_gradient:
            regressed = regressed.detach()
        next_boxes = []
        for boxes, size in zip(regressed.split([len(x) for x in output.boxes]), image_sizes):
            boxes = self.gradients.at_border(boxes, size)
            boxes = Boxes(boxes)
            boxes.clip(size)
            next_boxes.append(boxes)
        return next_boxes

    def run_passes(self, features: dict[str, torch.Tensor], proposals: list[Instances]) -> list[PassOutput]:
        """Run the cascade at inference.

        Args:
            features: the backbone's feature maps by name.
            proposals: one per image, with ``proposal_boxes``.

        Returns:
            one output per pass. A pass has no more boxes than the one before, in the same order: those that it is sure
            are background go no further.
        """
        image_sizes = [x.image_size for x in proposals]
        boxes = [x.proposal_boxes for x in proposals]
        outputs = []
        for index in range(self.num_passes_test):
            if index > 0:
                boxes = self._next_boxes(outputs[-1], image_sizes)
                if self.next_pass_min_score > 0:
                    keep = outputs[-1].foreground_scores >= self.next_pass_min_score
                    boxes = [x[k] for x, k in zip(boxes, keep.split([len(x) for x in boxes]))]
            mask_features, pooled = self._pool(features, boxes, index)
            masks = _module_of_pass(self.mask_head, index)(mask_features).sigmoid()
            outputs.append(PassOutput(index, boxes, masks, *self._classify(index, pooled, masks)))
        return outputs

    def detect_instances(self, outputs: list[PassOutput], image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """Reduce the candidates of all passes to instances by mask voting.

        Args:
            outputs: of all passes.
            image_sizes: (height, width) of each image.

        Returns:
            one Instances per image, as :func:`~mnc_d2.modeling.vote_masks` returns them.
        """
        predictor = _module_of_pass(self.predictor, 0)  # the thresholds are those of any pass
        boxes = gather_by_image([torch.cat([x.tensor for x in o.boxes]) for o in outputs], outputs)
        masks = gather_by_image([o.masks for o in outputs], outputs)
        scores = gather_by_image([o.mask_scores.softmax(dim=1)[:, : self.num_classes] for o in outputs], outputs)
        class_boxes = [None] * len(image_sizes)
        if self.detection_box == "regressed":
            class_boxes = gather_by_image([self._class_boxes(o) for o in outputs], outputs)
        return [
            vote_masks(
                *candidates,
                image_size,
                class_boxes=class_boxes_of_image,
                score_threshold=predictor.test_score_thresh,
                nms_threshold=predictor.test_nms_thresh,
                voting_iou_threshold=self.voting_iou_threshold,
                mask_threshold=self.mask_threshold,
                max_detections=predictor.test_topk_per_image,
                sampling=self.voting_sampling,
            )
            for *candidates, class_boxes_of_image, image_size in zip(boxes, scores, masks, class_boxes, image_sizes)
        ]

    def detect_boxes(self, outputs: list[PassOutput], image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """Reduce the candidates of all passes to boxes (MNC_box): class-specific, with box-level scores, after NMS.

        Args:
            outputs: of all passes.
            image_sizes: (height, width) of each image.

        Returns:
            one Instances per image with ``pred_boxes``, ``scores`` and ``pred_classes``, highest score first.
        """
        predictor = _module_of_pass(self.predictor, 0)
        boxes = [self._class_boxes(output) for output in outputs]
        detections, _ = fast_rcnn_inference(
            gather_by_image(boxes, outputs),
            gather_by_image([o.scores.softmax(dim=1) for o in outputs], outputs),
            image_sizes,
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        return detections

    def _class_boxes(self, output: PassOutput) -> torch.Tensor:
        """Regress the boxes of a pass for each foreground class: (R, 4 C)."""
        boxes = torch.cat([x.tensor for x in output.boxes])
        return _module_of_pass(self.predictor, output.index).predict_class_boxes(boxes, output.deltas)

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Predict masks in known boxes, as Detectron2's test-time augmentation asks for.

        Args:
            features: the backbone's feature maps by name.
            instances: one per image, with ``pred_boxes`` and ``pred_classes``.

        Returns:
            the same objects with ``pred_masks`` (D, 1, m, m), float32, if ``mask_on``.
        """
        if not self.mask_on:
            return instances
        index = self.num_passes_test - 1
        mask_features, _ = self._pool(features, [x.pred_boxes for x in instances], index)
        masks = _module_of_pass(self.mask_head, index)(mask_features).sigmoid()
        for instance, masks_of_image in zip(instances, masks.split([len(x) for x in instances])):
            instance.pred_masks = masks_of_image[:, None]
        return instances


def _module_of_pass(modules: nn.Module, index: int) -> nn.Module:
    """The module of a pass, where it may be that of all passes, or of a ModuleList with one per pass."""
    return modules[min(index, len(modules) - 1)] if isinstance(modules, nn.ModuleList) else modules


def _foreground(proposals: list[Instances], num_classes: int) -> torch.Tensor:
    """Which labelled proposals of all images are foreground by their box: (R,), bool."""
    return torch.cat([x.gt_classes for x in proposals]) < num_classes


def _append_boxes(boxes: list[Boxes], targets: list[Instances]) -> list[Boxes]:
    """Append the ground-truth boxes of each image to its boxes."""
    return [Boxes.cat([x, target.gt_boxes]) for x, target in zip(boxes, targets)]
