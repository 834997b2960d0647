"""Outputs and losses of the masked-feature classifier (section 3.3)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, ciou_loss, diou_loss
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import nn

from ...layers import at_least_float32
from .labels import RoILabels
from .loss_reduction import mean_over_images

# MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE beside "smooth_l1".
_BOX_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


class Predictions(NamedTuple):
    """What is predicted for each of R boxes; at least float32."""

    cls_logits: torch.Tensor  # (R, C + 1), at box level
    seg_cls_logits: torch.Tensor  # (R, C + 1), at mask level
    deltas: torch.Tensor  # (R, 4 (C + 1)), from the box to the object, by class


class MNCOutputLayers(FastRCNNOutputLayers):
    """Fast R-CNN's output layers with a second, mask-level classification.

    Box-level logits ("cls") are trained on labels by box IoU, mask-level logits ("seg_cls", as the authors name them)
    on labels by box and mask IoU. Box deltas are class-specific, also for the background: 4 (C + 1) of them, the
    background last as in the logits.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, **kwargs) -> None:
        """
        Args:
            input_shape: shape of the joint features.
            kwargs: those of Detectron2's ``FastRCNNOutputLayers``.
        """
        super().__init__(input_shape, **kwargs)
        input_size = self.cls_score.in_features
        self.seg_cls_score = nn.Linear(input_size, self.num_classes + 1)
        self.bbox_pred = nn.Linear(input_size, 4 * (self.num_classes + 1))
        for layer, std in ((self.seg_cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: torch.Tensor) -> Predictions:
        """Predict from the joint features (R, ...) of each RoI."""
        features = features.flatten(1)
        layers = (self.cls_score, self.seg_cls_score, self.bbox_pred)
        return Predictions(*(at_least_float32(layer(features)) for layer in layers))

    def losses(
        self, predictions: Predictions, labels: RoILabels, seg_classes: torch.Tensor, moving_targets: bool = False
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            predictions: for R RoIs.
            labels: of these, by box IoU.
            seg_classes: (R,), int64, labels by box IoU and mask IoU.
            moving_targets: whether regression targets move, in the derivative, with the boxes that they start from;
                else they are constants.

        Returns:
            scalars ``loss_cls``, ``loss_seg_cls`` and ``loss_box_reg``, means over the images of the means over the
            RoIs of each (:func:`~mnc_d2.modeling.roi_heads.loss_reduction.mean_over_images`).
        """
        boxes = labels.boxes if moving_targets else labels.boxes.detach()
        losses = {
            "loss_cls": F.cross_entropy(predictions.cls_logits, labels.classes, reduction="none"),
            "loss_seg_cls": F.cross_entropy(predictions.seg_cls_logits, seg_classes, reduction="none"),
            "loss_box_reg": self._box_losses(boxes, labels.gt_boxes, predictions.deltas, labels.classes),
        }
        means = mean_over_images(torch.stack(list(losses.values())), labels.counts)
        return {name: mean * self.loss_weight.get(name, 1.0) for name, mean in zip(losses, means.unbind())}

    def _box_losses(
        self, boxes: torch.Tensor, gt_boxes: torch.Tensor, deltas: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        """Regression loss of each RoI (R,), 0 for background; boxes (R, 4), deltas (R, 4 (C + 1)), classes (R,)."""
        losses_of_all = deltas.new_zeros(len(classes))
        foreground = (classes < self.num_classes).nonzero().squeeze(1)
        boxes, gt_boxes, classes = boxes[foreground], gt_boxes[foreground], classes[foreground]
        deltas = deltas.view(-1, self.num_classes + 1, 4)[foreground, classes]
        if self.box_reg_loss_type == "smooth_l1":
            targets = self.box2box_transform.get_deltas(boxes, gt_boxes)
            losses = smooth_l1_loss(deltas, targets, beta=self.smooth_l1_beta, reduction="none").sum(dim=1)
        else:
            regressed = self.box2box_transform.apply_deltas(deltas, boxes)
            losses = _BOX_LOSSES[self.box_reg_loss_type](regressed, gt_boxes, reduction="none")
        return losses_of_all.index_put((foreground,), losses)

    def regress_boxes(self, boxes: torch.Tensor, deltas: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Apply to each box the deltas of one class.

        Args:
            boxes: (R, 4), in image pixels.
            deltas: (R, 4 (C + 1)).
            classes: (R,), int64, in [0, C].

        Returns:
            (R, 4), in image pixels, differentiable in ``boxes`` and ``deltas``.
        """
        chosen = deltas.view(-1, self.num_classes + 1, 4)[torch.arange(boxes.shape[0], device=boxes.device), classes]
        return self.box2box_transform.apply_deltas(chosen, boxes)

    def predict_class_boxes(self, boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        """Return each box regressed for each foreground class, (R, 4 C), for boxes (R, 4) and deltas (R, 4 (C + 1))."""
        return self.box2box_transform.apply_deltas(deltas[:, : 4 * self.num_classes], boxes)
