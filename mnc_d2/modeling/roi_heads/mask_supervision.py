"""What masks are compared with in training: their targets, their loss, and the labels that depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Instances
from torchvision.ops import roi_align

from ...layers import roi_warp
from ..causal_gradients import CausalGradients
from .labels import RoILabels
from .loss_reduction import mean_over_images


class MaskLabels(NamedTuple):
    """What the masks of R RoIs are worth: constants, but for the loss."""

    seg_classes: torch.Tensor  # (R,), int64, labels by box IoU and mask IoU
    ious: torch.Tensor  # (R,), float32, IoU of each mask with the matched instance
    has_mask: torch.Tensor  # (R,), bool: the matched instance has a mask to compare with
    loss: torch.Tensor | None  # scalar, weighted; None for masks that are given


@dataclass
class MaskSupervision:
    """Labels and loss of masks.

    Args:
        mask_threshold: a predicted pixel is foreground from this probability on.
        target_threshold: a target's mask cell is foreground where the instance covers at least this part of it.
        iou_threshold: a RoI is foreground at mask level from this mask IoU on.
        loss_weight: of the mask loss.
        moving_targets: whether the targets move with the RoIs in the derivative, see :func:`warp_mask_targets`.
    """

    mask_threshold: float = 0.4
    target_threshold: float = 0.5
    iou_threshold: float = 0.5
    loss_weight: float = 1.0
    moving_targets: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode, gradients: CausalGradients) -> MaskSupervision:
        return cls(
            mask_threshold=cfg.MODEL.MNC.MASK_THRESHOLD,
            loss_weight=cfg.MODEL.MNC.MASK_LOSS_WEIGHT,
            moving_targets=gradients.moving_targets and gradients.mask_coordinates,
        )

    def __call__(
        self, masks: torch.Tensor, logits: torch.Tensor | None, labels: RoILabels, num_classes: int
    ) -> MaskLabels:
        """Label masks: a RoI is foreground at mask level if its box and its mask fit.

        Where the instance has no mask to compare with, the box decides (mixed supervision).

        Args:
            masks: (R, m, m), probabilities.
            logits: (R, m, m), of these; None for masks that are given and have no loss.
            labels: of the RoIs.
            num_classes: label of the background.
        """
        truth = match_masks(labels, masks.shape[-1])
        ious = instance_mask_iou(masks >= self.mask_threshold, truth.coverage, labels.boxes, truth.area)
        fits = (ious >= self.iou_threshold) | ~truth.has_mask
        loss = None
        if logits is not None:
            if self.moving_targets:
                target = warp_mask_targets(labels, masks.shape[-1])
            else:
                target = (truth.coverage >= self.target_threshold).to(logits)
            valid = (labels.classes < num_classes) & truth.has_mask
            loss = self.loss_weight * mask_loss(logits, target, valid, labels.counts)
        return MaskLabels(labels.classes.masked_fill(~fits, num_classes), ious, truth.has_mask, loss)


class MatchedMasks(NamedTuple):
    """The mask of the instance that each of R RoIs is matched to."""

    coverage: torch.Tensor  # (R, m, m), float32, as returned by crop_masks
    area: torch.Tensor  # (R,), float32, of the whole instance, in image pixels
    has_mask: torch.Tensor  # (R,), bool


@torch.no_grad()
def match_masks(labels: RoILabels, size: int) -> MatchedMasks:
    """Look up the mask of the instance that each RoI is matched to.

    Args:
        labels: of the RoIs; their targets have ``gt_masks`` (BitMasks or PolygonMasks) and, optionally,
            ``gt_has_mask``.
        size: m.
    """
    coverage, areas, has_mask = [], [], []
    for boxes, index, target in zip(labels.split(labels.boxes.detach()), labels.split(labels.gt_index), labels.targets):
        if len(target) == 0:
            coverage.append(boxes.new_zeros(len(boxes), size, size))
            areas.append(boxes.new_zeros(len(boxes)))
            has_mask.append(torch.zeros_like(index, dtype=torch.bool))
            continue
        masks = bit_masks(target).to(boxes)  # also the sum of floats is faster than that of bool
        present = target.gt_has_mask if target.has("gt_has_mask") else torch.ones_like(target.gt_classes).bool()
        coverage.append(crop_masks(masks, index, boxes, size))
        areas.append(masks.flatten(1).sum(dim=1)[index])
        has_mask.append(present[index])
    return MatchedMasks(torch.cat(coverage), torch.cat(areas), torch.cat(has_mask))


def bit_masks(target: Instances) -> torch.Tensor:
    """Return the masks of the ground truth of one image, whatever their format: (G, H, W), bool."""
    masks = target.gt_masks
    if isinstance(masks, BitMasks):
        return masks.tensor
    return BitMasks.from_polygon_masks(masks, *target.image_size).tensor.to(target.gt_boxes.device)


@torch.no_grad()
def crop_masks(masks: torch.Tensor, indices: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Crop instance masks to boxes and resize them.

    Args:
        masks: (G, H, W), bool or 0 and 1, of one image.
        indices: (R,), int64, the mask of each box.
        boxes: (R, 4), in image pixels.
        size: m.

    Returns:
        (R, m, m), float32, the part of each mask cell that the instance covers; 0 if there is no mask. Boxes lie in
        the image: like RoIAlign it repeats the border for one pixel around it.
    """
    if len(masks) == 0:
        return boxes.new_zeros(len(boxes), size, size)
    rois = torch.cat((indices[:, None].to(boxes), boxes), dim=1)
    # sampling_ratio=0 takes as many samples per mask cell as it has pixels.
    crops = roi_align(masks[:, None].to(boxes), rois, size, sampling_ratio=0, aligned=True)
    return crops.squeeze(1)


def warp_mask_targets(labels: RoILabels, size: int) -> torch.Tensor:
    """Sample the mask of the instance that each RoI is matched to, differentiably in the coordinates of the RoI.

    Args:
        labels, size: as in :func:`match_masks`.

    Returns:
        (R, m, m), float32: the mask, interpolated bilinearly, at the centre of each mask cell. Between the pixels of
        an edge it has values between 0 and 1 and moves with the box, by the exact derivative of a RoI warp.
    """
    warped = []
    for boxes, index, target in zip(labels.split(labels.boxes), labels.split(labels.gt_index), labels.targets):
        if len(target) == 0:
            warped.append(boxes.new_zeros(len(boxes), size, size))
            continue
        rois = torch.cat((index[:, None].to(boxes), boxes), dim=1)
        warped.append(roi_warp(bit_masks(target)[:, None].to(boxes), rois, size)[:, 0])
    return torch.cat(warped)


def mask_loss(logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Binary cross-entropy between predicted and ground-truth masks.

    Args:
        logits: (R, m, m), float32.
        target: (R, m, m), in [0, 1].
        valid: (R,), bool: foreground RoIs whose instance has a mask.
        counts: number of RoIs of each image; R in all.

    Returns:
        scalar: the mean over the images of the mean over the mask cells of an image's valid RoIs, 0 if it has none.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=(1, 2))
    return mean_over_images(loss, counts, valid)


@torch.no_grad()
def instance_mask_iou(
    predicted: torch.Tensor, coverage: torch.Tensor, boxes: torch.Tensor, areas: torch.Tensor
) -> torch.Tensor:
    """IoU of each predicted mask with the whole ground-truth instance, also the part of it outside the box.

    Args:
        predicted: (R, m, m), bool, in the frame of the box.
        coverage: (R, m, m), as returned by :func:`crop_masks`.
        boxes: (R, 4), in image pixels.
        areas: (R,), area in image pixels of the matched instance.

    Returns:
        (R,), float32, in [0, 1].
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).unbind(dim=1)
    cell_area = width * height / predicted[0].numel() if len(predicted) else width
    predicted = predicted.to(coverage)
    intersection = (predicted * coverage).sum(dim=(1, 2)) * cell_area
    # Resampling may count slightly more than the true area inside the box.
    areas = torch.maximum(areas, coverage.sum(dim=(1, 2)) * cell_area)
    union = predicted.sum(dim=(1, 2)) * cell_area + areas - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)
