"""Inputs of a whole model, as Detectron2's data loaders give them."""

import torch
from detectron2.structures import BitMasks, Boxes, Instances

from mnc_d2.modeling.roi_heads.mask_supervision import crop_masks

SIZE = 96


def make_inputs(count=2, size=SIZE):
    """Random images with two ellipses each."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(count):
        target = Instances((size, size))
        target.gt_boxes = Boxes(torch.tensor([[8.0, 10.0, 48.0, 60.0], [50.0, 40.0, 88.0, 90.0]]))
        target.gt_classes = torch.tensor([0, 1])
        masks = torch.zeros(2, size, size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, target.gt_boxes.tensor.tolist()):
            y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
            mask[((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1] = True
        target.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        proposals = make_mask_proposals(target)  # for models that do not make their own
        inputs.append({"image": image, "instances": target, "proposals": proposals, "height": size, "width": size})
    return inputs


def make_mask_proposals(target):
    """Of each instance its mask, and in the same box the rest, as mask proposals of 28 x 28."""
    index = torch.arange(len(target))
    masks = crop_masks(target.gt_masks.tensor, index, target.gt_boxes.tensor, 28)
    proposals = Instances(target.image_size)
    proposals.proposal_boxes = Boxes.cat([target.gt_boxes, target.gt_boxes])
    proposals.proposal_masks = torch.cat((masks, 1 - masks))
    proposals.objectness_logits = torch.zeros(len(proposals))
    return proposals
