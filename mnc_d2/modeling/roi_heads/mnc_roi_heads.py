"""Stages 2 to 1 + 2k: k passes of mask regression and masked-feature classification (sections 3.2 to 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from ...layers import BagMaxMemory, clip_boxes, image_corners
from ..causal_gradients import CausalGradients
from ..poolers import CascadePooler, RoIWarpPooler
from ..roi_anchors import RoIAnchorLoss
from .cascade_pass import CascadePass
from .mask_supervision import MaskSupervision, MaskTargets, foreground, mask_targets
from .mask_voting import vote_masks
from .metrics import log_metrics, masked_mean, recall
from .outputs import PassOutput, gather_by_image
from .sampling import label_boxes, sample_rois


@ROI_HEADS_REGISTRY.register()
class MNCROIHeads(ROIHeads):
    """The cascade after the RPN: each pass regresses a mask in every box, then classifies the box and its mask.

    The boxes of a pass are those that the pass before regressed. All passes share their weights, or each has its own.
    """

    @configurable
    def __init__(
        self,
        *,
        pooler: CascadePooler,
        passes: Sequence[CascadePass],
        num_passes_train: int = 2,
        num_passes_test: int = 2,
        gradients: CausalGradients | None = None,
        mask_supervision: MaskSupervision | None = None,
        sample: Callable[..., torch.Tensor] = sample_rois,
        append_gt_to_later_passes: bool = False,
        roi_anchor_loss: nn.Module | None = None,
        next_box_background: bool = True,
        next_pass_min_score: float = 0.0,
        vote: Callable[..., Instances] = vote_masks,
        mask_on: bool = True,
        **kwargs,
    ) -> None:
        """
        Args:
            pooler: features of boxes for the mask head and for the classifier.
            passes: the heads of each pass, or one for all; passes beyond the last take the last.
            num_passes_train, num_passes_test: k for training and for inference.
            gradients: which gradients flow from a stage to those before it.
            mask_supervision: targets, labels and loss of masks.
            sample: draws the RoIs of the first pass; takes what :func:`~mnc_d2.modeling.roi_heads.sampling.sample_rois`
                takes.
            append_gt_to_later_passes, next_box_background, next_pass_min_score: see :func:`mnc_d2.add_mnc_config`.
            roi_anchor_loss: a :class:`~mnc_d2.modeling.roi_anchors.RoIAnchorLoss` that is added to the losses.
            vote: reduces the candidates of one image to detections; takes what :func:`~mnc_d2.modeling.vote_masks`
                takes.
            mask_on: whether inference returns masks, by mask voting; if not, boxes only, scored at box level.
            kwargs: those of Detectron2's ``ROIHeads``.
        """
        super().__init__(**kwargs)
        if num_passes_train < 1 or num_passes_test < 1:
            raise ValueError("MODEL.MNC.NUM_PASSES_TRAIN and NUM_PASSES_TEST must be at least 1")
        for cascade_pass in passes:
            if pooler.output_size % cascade_pass.classifier.resolution:
                raise ValueError(
                    f"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION ({cascade_pass.classifier.resolution}) must divide "
                    f"MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION ({pooler.output_size})"
                )
        self.pooler = pooler
        self.passes = nn.ModuleList(passes)
        self.num_passes_train = num_passes_train
        self.num_passes_test = num_passes_test
        self.gradients = gradients or CausalGradients()
        self.mask_supervision = mask_supervision or MaskSupervision()
        self.sample = sample
        self.append_gt_to_later_passes = append_gt_to_later_passes
        self.roi_anchor_loss = roi_anchor_loss
        self.next_box_background = next_box_background
        self.next_pass_min_score = next_pass_min_score
        self.vote = vote
        self.mask_on = mask_on

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        mnc = cfg.MODEL.MNC
        if mnc.DETECTION_BOX not in ("tight", "regressed"):
            raise ValueError(f'MODEL.MNC.DETECTION_BOX must be "tight" or "regressed", got {mnc.DETECTION_BOX!r}')
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        mask_in_features = mnc.MASK_IN_FEATURES or in_features
        shapes, mask_shapes = (
            [(input_shape[name].stride, input_shape[name].channels) for name in names]
            for names in (in_features, mask_in_features)
        )
        if shapes != mask_shapes:
            raise ValueError(
                f"MODEL.MNC.MASK_IN_FEATURES {list(mask_in_features)} must have the strides and channels of "
                f"MODEL.ROI_HEADS.IN_FEATURES {list(in_features)}"
            )
        warp = RoIWarpPooler(
            output_size=cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION,
            scales=[1.0 / stride for stride, _ in shapes],
            sampling_ratio=cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO,
            sampling=mnc.ROI_WARP_SAMPLING,
        )
        return {
            **super().from_config(cfg),
            "pooler": CascadePooler(warp, in_features, mask_in_features),
            "passes": cls.build_passes(cfg, channels=shapes[0][1]),
            "num_passes_train": mnc.NUM_PASSES_TRAIN,
            "num_passes_test": mnc.NUM_PASSES_TEST,
            "gradients": CausalGradients.from_config(cfg),
            "mask_supervision": MaskSupervision.from_config(cfg),
            "sample": partial(
                sample_rois,
                bands=mnc.BACKGROUND_IOU_BANDS,
                band_fractions=mnc.BACKGROUND_FRACTIONS,
                refill=mnc.REFILL_BACKGROUND,
            ),
            "append_gt_to_later_passes": mnc.APPEND_GT_TO_LATER_PASSES,
            "roi_anchor_loss": RoIAnchorLoss(cfg) if mnc.ROI_ANCHOR_LOSS else None,
            "next_box_background": mnc.NEXT_BOX_BACKGROUND,
            "next_pass_min_score": mnc.NEXT_PASS_MIN_SCORE,
            "vote": partial(
                vote_masks,
                voting_iou_threshold=mnc.VOTING_IOU_THRESHOLD,
                mask_threshold=mnc.MASK_THRESHOLD,
                detection_box=mnc.DETECTION_BOX,
            ),
            "mask_on": cfg.MODEL.MASK_ON,
        }

    @classmethod
    def build_passes(cls, cfg, channels: int) -> list[CascadePass]:
        """Build the heads of each pass that is trained, or one for all, for features of so many channels."""
        count = 1 if cfg.MODEL.MNC.SHARE_PASSES else cfg.MODEL.MNC.NUM_PASSES_TRAIN
        return [CascadePass.from_config(cfg, channels) for _ in range(count)]

    def get_pass(self, index: int) -> CascadePass:
        """The heads of a pass, counted from 0."""
        return self.passes[min(index, len(self.passes) - 1)]

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
            In inference: the "instances" of :meth:`detect`, and no losses.
        """
        del images
        if not self.training:
            return self.detect(features, proposals)["instances"], {}
        if targets is None:
            raise ValueError(f"{type(self).__name__} needs targets in training")
        return self._train(features, proposals, targets)

    # ---- training

    def _train(
        self, features: dict[str, torch.Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Run the cascade in training; as :meth:`forward`."""
        features = self.gradients.scale_features(features, self.num_passes_train)
        boxes = [x.proposal_boxes for x in proposals]
        metrics = {f"s1/{name}": value for name, value in recall(boxes, targets).items()}
        losses = {}
        sampled = None
        for index in range(self.num_passes_train):
            if self.proposal_append_gt if index == 0 else self.append_gt_to_later_passes:
                boxes = [Boxes.cat([x, target.gt_boxes]) for x, target in zip(boxes, targets)]
            labelled = self.label_proposals(boxes, targets, sample=index == 0)
            if index == 0:
                sampled = labelled
                # Other RPNs than CausalRPN, and proposals from files, have no anchors to tell of.
                if self.roi_anchor_loss is not None and all(x.has("anchor_logits") for x in proposals):
                    losses.update(self.roi_anchor_loss(proposals, sampled, self.num_classes))
            output, pass_losses, pass_metrics = self._train_pass(index, features, labelled, targets)
            losses.update(pass_losses)
            metrics.update(pass_metrics)
            if index + 1 < self.num_passes_train:
                boxes = self._next_boxes(output)
        log_metrics(metrics)
        return sampled, losses

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
                self.sample,
                num_classes=self.num_classes,
                batch_size=self.batch_size_per_image,
                positive_fraction=self.positive_fraction,
            )
        return [
            label_boxes(boxes_of_image, target, self.proposal_matcher, self.num_classes, sampler)
            for boxes_of_image, target in zip(boxes, targets)
        ]

    def _train_pass(
        self, index: int, features: dict[str, torch.Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> tuple[PassOutput, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Run one pass on labelled proposals; return its output, its losses and its accuracies, named by stage."""
        for proposal, boxes in zip(proposals, self.gradients.detach_coordinates(proposals, self.num_classes)):
            proposal.proposal_boxes = boxes
        boxes = [x.proposal_boxes for x in proposals]
        mask_features, pooled = self.pooler(features, boxes, index, self.gradients.mask_coordinate_gradient)
        logits = self._train_mask_head(index, mask_features, foreground(proposals, self.num_classes))
        truth = mask_targets(proposals, targets, logits.shape[-1])
        moving = self.gradients.moving_targets and self.gradients.mask_coordinate_gradient
        mask_loss = self.mask_supervision.loss(logits, truth, proposals, targets, self.num_classes, moving)
        output, losses, metrics = self._train_classifier(index, pooled, logits.sigmoid(), proposals, truth)
        mask_stage, classifier_stage = 2 * index + 2, 2 * index + 3
        losses = {f"{name}_s{classifier_stage}": loss for name, loss in losses.items()}
        stages = {name: mask_stage if name == "mask_iou" else classifier_stage for name in metrics}
        metrics = {f"s{stages[name]}/{name}": value for name, value in metrics.items()}
        return output, {f"loss_mask_s{mask_stage}": mask_loss, **losses}, metrics

    def _train_mask_head(self, index: int, features: torch.Tensor, is_foreground: torch.Tensor) -> torch.Tensor:
        """Predict the mask logits (R, m, m) of pooled features (R, C, S, S).

        Those of background have no loss and, unless ``mask_gradient`` is "all", no gradient from the classifier. On a
        CPU they are computed without a graph, in a call of their own, which saves their backward pass. A GPU would be
        waited for, to say how many they are.
        """
        mask_head = self.get_pass(index).mask_head
        if self.gradients.mask_gradient == "all" or features.device.type != "cpu":
            return mask_head(features)
        count = int(is_foreground.sum())
        if count in (0, len(features)):
            return mask_head(features)
        order = is_foreground.long().argsort(descending=True, stable=True)  # foreground first
        # Chosen pixel by pixel, so that their gradient, too, lies in memory as the features do.
        by_pixel = features.permute(0, 2, 3, 1)
        logits = mask_head(by_pixel.index_select(0, order[:count]).permute(0, 3, 1, 2))
        with torch.no_grad():
            of_background = mask_head(features[order[count:]])
        return torch.cat((logits, of_background))[order.argsort()]

    def _train_classifier(
        self, index: int, pooled: torch.Tensor, masks: torch.Tensor, proposals: list[Instances], truth: MaskTargets
    ) -> tuple[PassOutput, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Label masks, and classify features under them.

        Args:
            index: of the pass.
            pooled: (R, C, S, S), features of the proposals.
            masks: (R, m, m), probabilities.
            proposals: labelled, one per image; they are given ``gt_seg_classes``.
            truth: masks of the matched instances.

        Returns:
            the output of the pass, the classifier's losses, and accuracies.
        """
        mask_ious = self.mask_supervision.label(masks, truth, proposals, self.num_classes)
        classes, seg_classes = (torch.cat([x.get(k) for x in proposals]) for k in ("gt_classes", "gt_seg_classes"))
        is_foreground = foreground(proposals, self.num_classes)
        is_seg_foreground = seg_classes < self.num_classes
        masks = self.gradients.of_masks(masks, is_seg_foreground)
        classifier = self.get_pass(index).classifier
        predictions = classifier(pooled, masks)
        losses = classifier.predictor.losses(predictions, proposals, self.gradients.moving_targets)
        metrics = {
            "mask_iou": masked_mean(mask_ious, is_foreground & truth.has_mask),
            "cls_accuracy": masked_mean(predictions.cls_logits.argmax(dim=1) == classes),
            "fg_cls_accuracy": masked_mean(predictions.cls_logits.argmax(dim=1) == classes, is_foreground),
            "seg_cls_accuracy": masked_mean(predictions.seg_cls_logits.argmax(dim=1) == seg_classes),
            "num_fg": is_foreground.sum() / len(proposals),
            "num_seg_fg": is_seg_foreground.sum() / len(proposals),
        }
        boxes, sizes = [x.proposal_boxes for x in proposals], [x.image_size for x in proposals]
        return PassOutput(index, boxes, sizes, masks, *predictions), losses, metrics

    # ---- inference

    def run_passes(self, features: dict[str, torch.Tensor], proposals: list[Instances]) -> list[PassOutput]:
        """Run the cascade at inference.

        Args:
            features: the backbone's feature maps by name.
            proposals: one per image, with ``proposal_boxes``.

        Returns:
            one output per pass. A pass has no more boxes than the one before, in the same order: those that it is sure
            are background go no further.
        """
        boxes, sizes = [x.proposal_boxes for x in proposals], [x.image_size for x in proposals]
        outputs, memory = [], BagMaxMemory()
        for index in range(self.num_passes_test):
            if index > 0:
                boxes = self._next_boxes(outputs[-1])
                if self.next_pass_min_score > 0:
                    keep = outputs[-1].foreground_probabilities >= self.next_pass_min_score
                    boxes = [x[k] for x, k in zip(boxes, outputs[-1].split(keep))]
            heads = self.get_pass(index)
            mask_features, pooled = self.pooler(features, boxes, index, memory=memory)
            masks = heads.mask_head(mask_features).sigmoid()
            outputs.append(PassOutput(index, boxes, sizes, masks, *heads.classifier(pooled, masks)))
            del mask_features, pooled  # much memory, which the next pass can take again
        return outputs

    def _next_boxes(self, output: PassOutput) -> list[Boxes]:
        """Regress the boxes of the next pass with the deltas of each box's best class, and clip them to the image."""
        allow_background = self.next_box_background and not self.training
        logits = output.seg_cls_logits if allow_background else output.seg_cls_logits[:, : self.num_classes]
        deltas = self.gradients.clip_deltas(output.deltas, len(output.boxes))
        predictor = self.get_pass(output.index).classifier.predictor
        boxes = output.box_tensor
        regressed = predictor.regress_boxes(boxes, deltas, logits.detach().argmax(dim=1))
        # What is not finite is found later on, by its scores in inference and by its losses in training.
        regressed = torch.where(regressed.isfinite(), regressed, boxes.detach())
        if not self.gradients.box_gradient:
            regressed = regressed.detach()
        corners = image_corners(output.image_sizes, [len(x) for x in output.boxes], regressed)
        clipped = clip_boxes(self.gradients.at_border(regressed, corners), corners)
        return [Boxes(x) for x in output.split(clipped)]

    def detect(
        self, features: dict[str, torch.Tensor], proposals: list[Instances], outputs: Sequence[str] = ("instances",)
    ) -> dict[str, list]:
        """Run the cascade, and reduce the boxes of all passes to what is asked for.

        Args:
            features, proposals: as in :meth:`run_passes`.
            outputs: names of what to return.

        Returns:
            by name, one element per image: "instances", of :meth:`detect_instances`, or of :meth:`detect_boxes` without
            ``mask_on``; "box_instances", of :meth:`detect_boxes`; "passes", a list of what each pass says of its boxes,
            see :meth:`PassOutput.describe`.
        """
        passes = self.run_passes(features, proposals)
        results = {}
        if "box_instances" in outputs or not self.mask_on:
            results["box_instances"] = self.detect_boxes(passes)
        results["instances"] = self.detect_instances(passes) if self.mask_on else results["box_instances"]
        if "passes" in outputs:
            results["passes"] = [list(of_image) for of_image in zip(*(output.describe() for output in passes))]
        return {name: results[name] for name in outputs}

    def detect_instances(self, outputs: list[PassOutput]) -> list[Instances]:
        """Reduce the candidates of all passes to instances by mask voting, see :func:`~mnc_d2.modeling.vote_masks`."""
        predictor = self.get_pass(0).classifier.predictor  # the thresholds are those of any pass
        return [
            self.vote(
                *candidates,
                image_size,
                class_boxes=class_boxes,
                score_threshold=predictor.test_score_thresh,
                nms_threshold=predictor.test_nms_thresh,
                max_detections=predictor.test_topk_per_image,
            )
            for *candidates, class_boxes, image_size in zip(
                gather_by_image(outputs, lambda output: output.box_tensor),
                gather_by_image(outputs, lambda output: output.seg_cls_probabilities[:, : self.num_classes]),
                gather_by_image(outputs, lambda output: output.masks),
                gather_by_image(outputs, self._class_boxes),
                outputs[0].image_sizes,
            )
        ]

    def detect_boxes(self, outputs: list[PassOutput]) -> list[Instances]:
        """Reduce the candidates of all passes to boxes (MNC_box): class-specific, with box-level scores, after NMS.

        Returns:
            one Instances per image with ``pred_boxes``, ``scores`` and ``pred_classes``, highest score first.
        """
        predictor = self.get_pass(0).classifier.predictor
        detections, _ = fast_rcnn_inference(
            gather_by_image(outputs, self._class_boxes),
            gather_by_image(outputs, lambda output: output.cls_probabilities),
            outputs[0].image_sizes,
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        return detections

    def _class_boxes(self, output: PassOutput) -> torch.Tensor:
        """Regress the boxes of a pass for each foreground class: (R, 4 C)."""
        return self.get_pass(output.index).classifier.predictor.predict_class_boxes(output.box_tensor, output.deltas)

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
        mask_features, _ = self.pooler(features, [x.pred_boxes for x in instances], index)
        masks = self.get_pass(index).mask_head(mask_features).sigmoid()
        for instance, masks_of_image in zip(instances, masks.split([len(x) for x in instances])):
            instance.pred_masks = masks_of_image[:, None]
        return instances
