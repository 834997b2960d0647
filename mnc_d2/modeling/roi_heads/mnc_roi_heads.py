"""Stages 2 to 1 + 2k: k passes of mask regression and masked-feature classification (sections 3.2 to 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from ...layers import clip_boxes, image_corners
from ..causal_gradients import CausalGradients
from ..poolers import CascadePooler
from .cascade_pass import CascadePass
from .detections import reduce_passes
from .labels import RoILabels, boxes_to_rois, label_boxes, sample_rois
from .mask_supervision import MaskSupervision
from .mask_voting import vote_masks
from .metrics import log_metrics
from .outputs import PassOutput
from .roi_anchor_loss import RoIAnchorLoss


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
        roi_anchor_loss: RoIAnchorLoss | None = None,
        next_box_background: bool = False,
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
            sample: draws the RoIs of the first pass, as :func:`~mnc_d2.modeling.roi_heads.labels.sample_rois` does.
            append_gt_to_later_passes: what ``proposal_append_gt`` is for the first pass.
            roi_anchor_loss: a loss that is added for the anchors behind sampled RoIs.
            next_box_background: whether at inference background may regress a box for the next pass.
            next_pass_min_score: probability of foreground, at box or at mask level, that a box needs for the next pass.
            vote: reduces the candidates of one image to detections, as :func:`~mnc_d2.modeling.vote_masks` does.
            mask_on: whether inference returns masks, by mask voting; if not, boxes only, scored at box level.
            kwargs: the arguments of Detectron2's ``ROIHeads``.
        """
        super().__init__(**kwargs)
        if num_passes_train < 1 or num_passes_test < 1:
            raise ValueError("MODEL.MNC.NUM_PASSES_TRAIN and NUM_PASSES_TEST must be at least 1")
        self.pooler = pooler
        self.passes = nn.ModuleList(passes)
        self.num_passes_train = num_passes_train
        self.num_passes_test = num_passes_test
        self.gradients = gradients or CausalGradients()
        self.mask_supervision = mask_supervision or MaskSupervision()
        self.sample = partial(
            sample,
            num_classes=self.num_classes,
            batch_size=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
        )
        self.append_gt_to_later_passes = append_gt_to_later_passes
        self.roi_anchor_loss = roi_anchor_loss
        self.next_box_background = next_box_background
        self.next_pass_min_score = next_pass_min_score
        self.vote = vote
        self.mask_on = mask_on

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        mnc = cfg.MODEL.MNC
        gradients = CausalGradients.parse(mnc.GRADIENTS)
        return {
            **super().from_config(cfg),
            "pooler": CascadePooler.from_config(cfg, input_shape),
            "passes": cls.build_passes(cfg, input_shape),
            "num_passes_train": mnc.NUM_PASSES_TRAIN,
            "num_passes_test": mnc.NUM_PASSES_TEST,
            "gradients": gradients,
            "mask_supervision": MaskSupervision.from_config(cfg, gradients),
            "sample": partial(sample_rois, bands=mnc.BACKGROUND_BANDS),
            "roi_anchor_loss": RoIAnchorLoss(cfg) if gradients.anchors else None,
            "next_pass_min_score": mnc.NEXT_PASS_MIN_SCORE,
            "vote": partial(vote_masks, mask_threshold=mnc.MASK_THRESHOLD, detection_box=mnc.DETECTION_BOX),
            "mask_on": cfg.MODEL.MASK_ON,
        }

    @classmethod
    def build_passes(cls, cfg, input_shape: dict[str, ShapeSpec]) -> list[CascadePass]:
        """Build the heads of each pass that is trained, or one for all."""
        count = 1 if cfg.MODEL.MNC.SHARE_PASSES else cfg.MODEL.MNC.NUM_PASSES_TRAIN
        return [CascadePass.from_config(cfg, input_shape) for _ in range(count)]

    def get_pass(self, index: int) -> CascadePass:
        """Return the heads of a pass, counted from 0."""
        return cast(CascadePass, self.passes[min(index, len(self.passes) - 1)])

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
            In training: the labelled RoIs of the first pass, and the losses named by stage.
            In inference: the "instances" of :meth:`detect`, and no losses.
        """
        del images
        if not self.training:
            return self.detect(features, proposals)["instances"], {}
        if targets is None:
            raise ValueError(f"{type(self).__name__} needs targets in training")
        return self.train_passes(features, proposals, targets)

    def train_passes(
        self, features: dict[str, torch.Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Run the cascade in training; as :meth:`forward`."""
        features = self.gradients.scale_features(features, self.num_passes_train)
        boxes = [x.proposal_boxes for x in proposals]
        losses, trained = dict[str, torch.Tensor](), list[tuple[PassOutput, RoILabels]]()
        corners = image_corners([x.image_size for x in proposals], boxes[0].tensor)
        for index in range(self.num_passes_train):
            labels = self.label_boxes(boxes, targets, is_first=index == 0)
            output = self.run_pass(index, features, labels.rois, labels)
            losses |= self.losses(output, labels)
            trained.append((output, labels))
            if index + 1 < self.num_passes_train:
                boxes = [Boxes(x) for x in labels.split(self.next_rois(output, corners)[:, 1:])]
        log_metrics([x.proposal_boxes for x in proposals], trained, self.num_classes)
        output, labels = trained[0]
        # Other RPNs than CausalRPN, and proposals from files, have no anchors.
        if self.roi_anchor_loss is not None and all(x.has("anchor_logits") for x in proposals):
            losses |= self.roi_anchor_loss(proposals, labels, self.num_classes)
        return labels.to_instances(gt_seg_classes=output.seg_classes), losses

    def label_boxes(self, boxes: list[Boxes], targets: list[Instances], is_first: bool) -> RoILabels:
        """Match the boxes of each image to its ground truth. For the first pass, some of them are drawn."""
        append_gt = self.proposal_append_gt if is_first else self.append_gt_to_later_passes
        sampler = self.sample if is_first else None
        labels = label_boxes(boxes, targets, self.proposal_matcher, self.num_classes, sampler, append_gt)
        return replace(labels, rois=self.gradients.detach_coordinates(labels.rois, labels.classes < self.num_classes))

    def losses(self, output: PassOutput, labels: RoILabels) -> dict[str, torch.Tensor]:
        """Return the losses of a pass, scalars, named by its stages."""
        predictor = self.get_pass(output.index).classifier.predictor
        losses = predictor.losses(output.predictions, labels, output.seg_classes, self.gradients.moving_targets)
        losses = {f"{name}_s{2 * output.index + 3}": loss for name, loss in losses.items()}
        mask_loss = output.mask_labels and output.mask_labels.loss
        return losses if mask_loss is None else {f"loss_mask_s{2 * output.index + 2}": mask_loss, **losses}

    def run_pass(
        self,
        index: int,
        features: dict[str, torch.Tensor],
        rois: torch.Tensor,
        labels: RoILabels | None = None,
        masks: torch.Tensor | None = None,
    ) -> PassOutput:
        """Regress a mask in every box, and classify the box by the features in it and under its mask.

        Training, inference and exported models run this, and so do the models of the experiments.

        Args:
            index: of the pass, from 0.
            features: the backbone's feature maps by name.
            rois: (R, 5), index of the image and box, in image pixels.
            labels: of these RoIs, in training.
            masks: (R, m, m), probabilities that are given, in place of those that the mask head predicts.
        """
        heads = self.get_pass(index)
        mask_features, box_features = self.pooler(features, rois, index, self.gradients.mask_coordinates)
        logits, mask_labels = None, None
        if masks is None:
            logits = heads.predict_masks(mask_features)
            masks = logits.sigmoid()
        if labels is not None:
            mask_labels = self.mask_supervision(masks, logits, labels, self.num_classes)
            masks = self.gradients.detach_masks(masks, mask_labels.seg_classes < self.num_classes)
        return PassOutput(index, rois, masks, heads.classifier(box_features, masks), mask_labels)

    def next_rois(self, output: PassOutput, corners: torch.Tensor) -> torch.Tensor:
        """Regress the boxes of the next pass with the deltas of each box's best class, and clip them to the image.

        Args:
            output: of a pass on R boxes.
            corners: (N, 4), of the images, see :func:`~mnc_d2.layers.image_corners`.

        Returns:
            (R, 5), index of the image and box, in image pixels.
        """
        allow_background = self.next_box_background and not self.training
        logits = output.predictions.seg_cls_logits.detach()
        classes = (logits if allow_background else logits[:, : self.num_classes]).argmax(dim=1)
        deltas = self.gradients.clip_deltas(output.predictions.deltas, len(corners))
        predictor = self.get_pass(output.index).classifier.predictor
        boxes = predictor.regress_boxes(output.boxes, deltas, classes)
        # What is not finite is found later on, by its scores in inference and by its losses in training.
        boxes = torch.where(boxes.isfinite(), boxes, output.boxes.detach())
        if not self.gradients.boxes:
            boxes = boxes.detach()
        corners = corners[output.rois[:, 0].long()]
        boxes = clip_boxes(self.gradients.detach_at_border(boxes, corners), corners)
        return torch.cat((output.rois[:, :1], boxes), dim=1)

    def run_passes(
        self, features: dict[str, torch.Tensor], rois: torch.Tensor, image_sizes: Sequence[tuple[int, int]]
    ) -> list[PassOutput]:
        """Run the cascade at inference.

        Args:
            features: the backbone's feature maps by name.
            rois: (R, 5), index of the image and proposal, in image pixels, one image after another.
            image_sizes: (height, width) of each image.

        Returns:
            one output per pass. The order of boxes stays, but clear background goes no further.
        """
        corners = image_corners(image_sizes, rois)
        outputs = [self.run_pass(0, features, rois)]
        for index in range(1, self.num_passes_test):
            rois = self.next_rois(outputs[-1], corners)
            if self.next_pass_min_score > 0:
                rois = rois[outputs[-1].foreground_probabilities >= self.next_pass_min_score]
            outputs.append(self.run_pass(index, features, rois))
        return outputs

    def predict(self, features: dict[str, torch.Tensor], proposals: list[Instances]) -> list[PassOutput]:
        """Run :meth:`run_passes` on proposals, one Instances per image with ``proposal_boxes``."""
        rois = boxes_to_rois([x.proposal_boxes for x in proposals])
        return self.run_passes(features, rois, [x.image_size for x in proposals])

    def detect(
        self, features: dict[str, torch.Tensor], proposals: list[Instances], outputs: Sequence[str] = ("instances",)
    ) -> dict[str, list]:
        """Run the cascade on proposals, and reduce the boxes of all passes to detections.

        Returns:
            of each of ``outputs``, one element per image: see
            :func:`~mnc_d2.modeling.roi_heads.detections.reduce_passes`.
        """
        passes = self.predict(features, proposals)
        return self.reduce(passes, [x.image_size for x in proposals], outputs)

    def reduce(
        self, passes: list[PassOutput], image_sizes: Sequence[tuple[int, int]], outputs: Sequence[str]
    ) -> dict[str, list]:
        """Reduce the boxes of all passes as :meth:`detect` does, in images of (height, width)."""
        vote = self.vote if self.mask_on else None
        predictor = self.get_pass(0).classifier.predictor  # all passes have the same thresholds
        return reduce_passes(passes, image_sizes, outputs, predictor, self.predict_class_boxes, vote)

    def predict_class_boxes(self, output: PassOutput) -> torch.Tensor:
        """Regress the R boxes of a pass for each foreground class: (R, 4 C)."""
        predictor = self.get_pass(output.index).classifier.predictor
        return predictor.predict_class_boxes(output.boxes, output.predictions.deltas)

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Give instances with ``pred_boxes`` their ``pred_masks``, as Detectron2's ``StandardROIHeads`` do."""
        if self.mask_on:
            output = self.run_pass(self.num_passes_test - 1, features, boxes_to_rois([x.pred_boxes for x in instances]))
            for instance, masks in zip(instances, output.masks.split([len(x) for x in instances])):
                instance.pred_masks = masks[:, None]
        return instances
