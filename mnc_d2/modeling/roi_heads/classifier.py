"""Stages 3, 5, ...: outputs and losses of the masked-feature classifier (section 3.3)."""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cross_entropy
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import nn

from ...layers import at_least_float32, clip_gradient


class MNCOutputLayers(FastRCNNOutputLayers):
    """Fast R-CNN's output layers with a second, mask-level classification.

    Box-level scores are trained on labels by box IoU, mask-level scores on labels by box and mask IoU. Box deltas are
    class-specific, also for the background: 4 (C + 1) of them, the background last as in the scores.
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

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            features: (R, ...), the joint features of each RoI.

        Returns:
            box-level logits (R, C + 1), mask-level logits (R, C + 1), box deltas (R, 4 (C + 1)); at least float32.
        """
        features = features.flatten(1)
        return (
            at_least_float32(self.cls_score(features)),
            at_least_float32(self.seg_cls_score(features)),
            at_least_float32(self.bbox_pred(features)),
        )

    def losses(
        self, predictions: tuple[torch.Tensor, torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            predictions: what :meth:`forward` returned.
            proposals: one per image, with ``proposal_boxes``, ``gt_boxes``, ``gt_classes`` (labels by box IoU) and
                ``gt_mask_classes`` (labels by box and mask IoU).

        Returns:
            scalars ``loss_cls``, ``loss_seg_cls`` and ``loss_box_reg``.
        """
        scores, mask_scores, deltas = predictions
        gt_classes = torch.cat([x.gt_classes for x in proposals])
        # Regression targets are constants, although the boxes that they start from carry gradients.
        boxes = torch.cat([x.proposal_boxes.tensor for x in proposals]).detach()
        gt_boxes = torch.cat([x.gt_boxes.tensor for x in proposals])
        losses = {
            "loss_cls": cross_entropy(scores, gt_classes),
            "loss_seg_cls": cross_entropy(mask_scores, torch.cat([x.gt_mask_classes for x in proposals])),
            "loss_box_reg": self.box_reg_loss(boxes, gt_boxes, deltas[:, : 4 * self.num_classes], gt_classes),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def regress_boxes(
        self, boxes: torch.Tensor, deltas: torch.Tensor, classes: torch.Tensor, gradient_clip: float = 0.0
    ) -> torch.Tensor:
        """Apply to each box the deltas of one class.

        Args:
            boxes: (R, 4), in image pixels.
            deltas: (R, 4 (C + 1)).
            classes: (R,), int64, in [0, C].
            gradient_clip: limit of each element of the gradient that goes to ``deltas`` this way; 0 for none.

        Returns:
            (R, 4), in image pixels, differentiable in ``boxes`` and ``deltas``.
        """
        chosen = deltas.view(-1, self.num_classes + 1, 4)[torch.arange(len(boxes), device=boxes.device), classes]
        return self.box2box_transform.apply_deltas(clip_gradient(chosen, gradient_clip), boxes)

    def predict_class_boxes(self, boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        """Return each box regressed for each foreground class, (R, 4 C), for boxes (R, 4) and deltas (R, 4 (C + 1))."""
        return self.box2box_transform.apply_deltas(deltas[:, : 4 * self.num_classes], boxes)
