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
from .loss_reduction import mean_over_images


@dataclass
class MaskSupervision:
    """The thresholds, and the weight of the loss, as :func:`mnc_d2.add_mnc_config` explains them."""

    mask_threshold: float = 0.4
    target_threshold: float = 0.5
    iou_threshold: float = 0.5
    loss_weight: float = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> MaskSupervision:
        mnc = cfg.MODEL.MNC
        return cls(
            mask_threshold=mnc.MASK_THRESHOLD,
            target_threshold=mnc.MASK_TARGET_THRESHOLD,
            iou_threshold=mnc.MASK_IOU_THRESHOLD,
            loss_weight=mnc.MASK_LOSS_WEIGHT,
        )

    def loss(
        self,
        logits: torch.Tensor,
        truth: MaskTargets,
        proposals: list[Instances],
        targets: list[Instances],
        num_classes: int,
        moving: bool,
    ) -> torch.Tensor:
        """The weighted loss of mask logits (R, m, m) in labelled proposals.

        Args:
            logits: (R, m, m).
            truth, proposals, targets: see :func:`mask_targets`.
            num_classes: label of the background.
            moving: whether the targets move with the proposals in the derivative, see :func:`warp_mask_targets`.
        """
        if moving:
            target = warp_mask_targets(proposals, targets, logits.shape[-1])
        else:
            target = (truth.coverage >= self.target_threshold).to(logits)
        valid = foreground(proposals, num_classes) & truth.has_mask
        return self.loss_weight * mask_loss(logits, target, valid, [len(x) for x in proposals])

    @torch.no_grad()
    def label(
        self, masks: torch.Tensor, truth: MaskTargets, proposals: list[Instances], num_classes: int
    ) -> torch.Tensor:
        """Label predicted masks (R, m, m): a proposal is foreground at mask level if its box and its mask fit.

        Where the instance has no mask to compare with, the box decides (mixed supervision).

        Args:
            masks: (R, m, m), probabilities.
            truth: see :func:`mask_targets`.
            proposals: labelled, one per image; they are given ``gt_seg_classes``.
            num_classes: label of the background.

        Returns:
            (R,), float32, the IoU of each mask with the matched instance.
        """
        boxes = torch.cat([x.proposal_boxes.tensor for x in proposals])
        ious = instance_mask_iou(masks >= self.mask_threshold, truth.coverage, boxes, truth.area)
        fits = (ious >= self.iou_threshold) | ~truth.has_mask
        for proposal, fits_of_image in zip(proposals, fits.split([len(x) for x in proposals])):
            proposal.gt_seg_classes = proposal.gt_classes.masked_fill(~fits_of_image, num_classes)
        return ious


def foreground(proposals: list[Instances], num_classes: int) -> torch.Tensor:
    """Which labelled proposals of all images are foreground by their box: (R,), bool."""
    return torch.cat([x.gt_classes for x in proposals]) < num_classes


class MaskTargets(NamedTuple):
    """The mask of the instance that each of R RoIs is matched to."""

    coverage: torch.Tensor  # (R, m, m), float32, as returned by crop_masks
    area: torch.Tensor  # (R,), float32, of the whole instance, in image pixels
    has_mask: torch.Tensor  # (R,), bool


@torch.no_grad()
def mask_targets(proposals: list[Instances], targets: list[Instances], size: int) -> MaskTargets:
    """Look up the mask of the instance that each RoI is matched to.

    Args:
        proposals: one per image, with ``proposal_boxes`` and ``gt_index``; R in all.
        targets: one per image, with ``gt_masks`` (BitMasks or PolygonMasks) and, optionally, ``gt_has_mask``.
        size: m.
    """
    coverage, areas, has_mask = [], [], []
    for proposal, target in zip(proposals, targets):
        index, boxes = proposal.gt_index, proposal.proposal_boxes.tensor.detach()
        if len(target) == 0:
            coverage.append(boxes.new_zeros(len(boxes), size, size))
            areas.append(boxes.new_zeros(len(boxes)))
            has_mask.append(torch.zeros_like(index, dtype=torch.bool))
            continue
        masks = _bit_masks(target, boxes.device).tensor.to(boxes)  # also the sum of floats is faster than that of bool
        present = target.gt_has_mask if target.has("gt_has_mask") else torch.ones_like(target.gt_classes).bool()
        coverage.append(crop_masks(masks, index, boxes, size))
        areas.append(masks.flatten(1).sum(dim=1)[index])
        has_mask.append(present[index])
    return MaskTargets(torch.cat(coverage), torch.cat(areas), torch.cat(has_mask))


def _bit_masks(target: Instances, device: torch.device) -> BitMasks:
    """The masks of the ground truth of one image, whatever their format."""
    masks = target.gt_masks
    return masks if isinstance(masks, BitMasks) else BitMasks.from_polygon_masks(masks, *target.image_size).to(device)


@torch.no_grad()
def crop_masks(masks: torch.Tensor, indices: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Crop instance masks to boxes and resize them.

    Args:
        masks: (G, H, W), bool or 0 and 1, of one image.
        indices: (R,), int64, the mask of each box.
        boxes: (R, 4), in image pixels.
        size: m.

    Returns:
        (R, m, m), float32, the part of each texel that the mask covers; 0 if there is no mask. Boxes lie in the
        image: like RoIAlign it repeats the border for one pixel around it.
    """
    if len(masks) == 0:
        return boxes.new_zeros(len(boxes), size, size)
    rois = torch.cat((indices[:, None].to(boxes), boxes), dim=1)
    # sampling_ratio=0 takes as many samples per texel as it has pixels.
    crops = roi_align(masks[:, None].to(boxes), rois, size, sampling_ratio=0, aligned=True)
    return crops.squeeze(1)


def warp_mask_targets(proposals: list[Instances], targets: list[Instances], size: int) -> torch.Tensor:
    """Sample the mask of the instance that each RoI is matched to, differentiably in the coordinates of the RoI.

    Args:
        proposals, targets, size: as in :func:`mask_targets`.

    Returns:
        (R, m, m), float32: the mask, interpolated bilinearly, at the centre of each texel. Between the pixels of an
        edge it has values between 0 and 1 and moves with the box, by the exact derivative of a RoI warp.
    """
    warped = []
    for proposal, target in zip(proposals, targets):
        boxes = proposal.proposal_boxes.tensor
        if len(target) == 0:
            warped.append(boxes.new_zeros(len(boxes), size, size))
            continue
        masks = _bit_masks(target, boxes.device).tensor
        rois = torch.cat((proposal.gt_index[:, None].to(boxes), boxes), dim=1)
        warped.append(roi_warp(masks[:, None].to(boxes), rois, size)[:, 0])
    return torch.cat(warped)


def mask_loss(logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Binary cross-entropy between predicted and ground-truth masks.

    Args:
        logits: (R, m, m), float32.
        target: (R, m, m), in [0, 1].
        valid: (R,), bool: foreground RoIs whose instance has a mask.
        counts: number of RoIs of each image; R in all.

    Returns:
        scalar: the mean over the images of the mean over the texels of an image's valid RoIs, 0 if it has none.
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
    texel_area = width * height / predicted[0].numel() if len(predicted) else width
    predicted = predicted.to(coverage)
    intersection = (predicted * coverage).sum(dim=(1, 2)) * texel_area
    # Resampling may count slightly more than the true area inside the box.
    areas = torch.maximum(areas, coverage.sum(dim=(1, 2)) * texel_area)
    union = predicted.sum(dim=(1, 2)) * texel_area + areas - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)
