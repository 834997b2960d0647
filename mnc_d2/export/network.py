"""A trained model as one function from an image to the candidates of every pass, which can be traced."""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from torch import nn
from torchvision.ops import nms, roi_align

from ..modeling import VGG16, CascadePooler, CausalRPN, MNCROIHeads, MultitaskNetworkCascade, RoIWarpPooler

# What the network returns, see :meth:`CandidateNetwork.forward`.
CANDIDATES = ("boxes", "scores", "masks", "class_boxes")


class CandidateNetwork(nn.Module):
    """The modules of a model, joined so that torch.export finds no size and no number of boxes to be a constant.

    Stage 1 is written for one image; the passes are :meth:`MNCROIHeads.run_passes`.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, model: MultitaskNetworkCascade) -> None:
        """
        Args:
            model: in eval mode.

        Raises:
            ValueError: the model has a part that cannot be exported.
        """
        super().__init__()
        check_exportable(model)
        self.backbone = with_fixed_padding(model.backbone)
        self.rpn = model.proposal_generator
        self.roi_heads = with_traceable_operators(model.roi_heads)
        self.register_buffer("pixel_mean", model.pixel_mean, persistent=False)
        self.register_buffer("pixel_std", model.pixel_std, persistent=False)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Find the candidates of an image.

        Args:
            image: (3, H, W), float32, 0 to 255, with channels as INPUT.FORMAT says, resized as INPUT asks for.

        Returns:
            of K boxes, those of the first pass first: "boxes" (K, 4), x1, y1, x2, y2 in pixels of ``image``; "scores"
            (K, C), probability of each class at mask level; "masks" (K, m, m), probabilities in the frame of the box;
            "class_boxes" (K, 4 C), each box regressed for each class. All float32.
        """
        height, width = image.shape[1:]
        features = self.backbone(self._pad((image - self.pixel_mean) / self.pixel_std)[None])
        rois = F.pad(self._propose(features, height, width), (1, 0))
        heads = self.roi_heads
        outputs = heads.run_passes(features, rois, [(height, width)])
        predictor = heads.get_pass(0).classifier.predictor
        candidates = (
            [x.boxes for x in outputs],
            [x.seg_cls_probabilities[:, : heads.num_classes] for x in outputs],
            [x.masks for x in outputs],
            [predictor.predict_class_boxes(x.boxes, x.predictions.deltas) for x in outputs],
        )
        return dict(zip(CANDIDATES, map(torch.cat, candidates)))

    def _pad(self, image: torch.Tensor) -> torch.Tensor:
        """Pad an image at its right and lower border to sizes that the backbone takes."""
        divisor = self.backbone.size_divisibility
        if divisor < 2:
            return image
        height, width = image.shape[1:]
        rows = (height + divisor - 1) // divisor * divisor
        columns = (width + divisor - 1) // divisor * divisor
        return F.pad(image, (0, columns - width, 0, rows - height))

    # ---- stage 1

    def _propose(self, features: dict[str, torch.Tensor], height: int, width: int) -> torch.Tensor:
        """Return the proposals (P, 4) of an image, highest objectness first."""
        rpn = self.rpn
        maps = [features[name] for name in rpn.in_features]
        levels = [
            self._propose_level(level, logits[0], deltas[0], height, width)
            for level, (logits, deltas) in enumerate(zip(*rpn.rpn_head(maps)))
        ]
        boxes, scores = (torch.cat(x) for x in zip(*levels))
        order = scores.argsort(descending=True)[: rpn.post_nms_topk[False]]
        kept = scores[order] > -torch.inf
        if isinstance(rpn, CausalRPN):
            kept &= rpn.is_promising(scores[order])
        return boxes[order[kept]]

    def _propose_level(
        self, level: int, logits: torch.Tensor, deltas: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return boxes (P, 4) and scores (P,) of a level after NMS. Those with a score of -inf are none.

        Args:
            level: index of the feature map.
            logits: (A, H, W).
            deltas: (4 A, H, W).
            height, width: of the image.
        """
        rpn, generator = self.rpn, self.rpn.anchor_generator
        of_cell = list(generator.cell_anchors)[level]
        rows, columns = logits.shape[1:]
        logits, deltas = logits.flatten(), deltas.unflatten(0, (-1, 4)).flatten(2)  # (A H W,), (A, 4, H W)
        best = logits.topk(torch.sym_min(logits.shape[0], rpn.pre_nms_topk[False]))
        kind, pixel = _divide(best.indices, rows * columns)
        row, column = _divide(pixel, columns)
        x, y = ((z + generator.offset) * generator.strides[level] for z in (column, row))
        anchors = of_cell[kind] + torch.stack((x, y, x, y), dim=1)
        boxes = rpn.box2box_transform.apply_deltas(deltas[kind, :, pixel], anchors)
        finite = boxes.isfinite().all(dim=1) & best.values.isfinite()
        boxes = _clip(boxes, height, width)
        valid = finite & ((boxes[:, 2:] - boxes[:, :2]) > rpn.min_box_size).all(dim=1)
        scores = torch.where(valid, best.values, -torch.inf)
        # torch.export takes it that NMS leaves two boxes at least. Two without extent, the worst, suppress nothing.
        boxes, scores = F.pad(boxes, (0, 0, 0, 2)), F.pad(scores, (0, 2), value=-torch.inf)
        kept = nms(boxes, scores, rpn.nms_thresh)
        return boxes[kept], scores[kept]


class StackedPooler(CascadePooler):
    """RoI warp of one image by one RoIAlign on the maps of all levels.

    RoIAlign with one sample a bin is the same, and an operator of both formats. The results of several would have to be
    joined and brought into order, which takes onnxruntime a fifth of their time.
    """

    def forward(
        self, features: dict[str, torch.Tensor], rois: torch.Tensor, index: int, mask_coordinates: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`CascadePooler.forward`, for RoIs (R, 5) of the first image."""
        warp, boxes = self.pooler, rois[:, 1:]
        levels = self._levels(boxes)
        stacked, tops = _stack_levels([features[name] for name in self.in_features], levels)
        boxes = boxes * boxes.new_tensor(warp.scales)[levels, None]
        rois = F.pad(torch.stack((boxes[:, 0] + 1, boxes[:, 1] + tops, boxes[:, 2] + 1, boxes[:, 3] + tops), 1), (1, 0))
        ratio = warp.sampling_ratio
        pooled = roi_align(stacked, rois, warp.output_size * ratio, 1.0, sampling_ratio=1, aligned=True)
        if ratio > 1:
            pooled = ChannelwiseMaxPool2d(warp.output_size)(pooled)
        return pooled, pooled

    def _levels(self, boxes: torch.Tensor) -> torch.Tensor:
        """Which of the maps each box belongs to, as Detectron2's ``assign_boxes_to_levels``: (R,), int64."""
        warp = self.pooler
        sizes = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
        levels = torch.floor(warp.canonical_level + torch.log2(sizes / warp.canonical_box_size + 1e-8))
        return levels.clamp(warp.min_level, warp.max_level).long() - warp.min_level


def _stack_levels(maps: list[torch.Tensor], levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay the maps (1, C, H_l, W_l) one below another, each with a border that repeats its outermost pixels.

    Between a pixel and the border a sample is what RoIAlign takes it to be at the edge of a map: the pixel.

    Args:
        maps: in the order of falling size.
        levels: (R,), int64, numbers of maps.

    Returns:
        (1, C, H, W_0 + 2), and for each level of ``levels`` the row, (R,), where its map begins within the border.
    """
    width = maps[0].shape[3] + 2
    rows, tops = [], torch.ones_like(levels)
    for level, x in enumerate(maps):
        x = torch.cat((x[..., :1], x, x[..., -1:]), dim=3)
        x = torch.cat((x[..., :1, :], x, x[..., -1:, :]), dim=2)
        rows.append(F.pad(x, (0, width - x.shape[3])))
        tops = torch.where(levels > level, tops + x.shape[2], tops)
    return torch.cat(rows, dim=2), tops


def _divide(x: torch.Tensor, divisor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return quotient and remainder. The ONNX exporter has no remainder by a size that is not constant."""
    quotient = x // divisor
    return quotient, x - quotient * divisor


def _clip(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Clip boxes (R, 4) to an image."""
    x, y = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
    return torch.stack((x, y), dim=2).reshape(-1, 4)


class ChannelwiseMaxPool2d(nn.Module):
    """Max pooling to s x s of each channel as an image of its own.

    For many channels onnxruntime has another order in memory, and takes as long to bring them into it as to pool them.
    """

    def __init__(self, output_size: int) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.max_pool2d(x.flatten(0, 1)[:, None], x.shape[-1] // self.output_size)
        return pooled.view(*x.shape[:2], self.output_size, self.output_size)


class _PixelShuffledConv2d(nn.Module):
    """A ``ConvTranspose2d`` without overlap as a convolution that predicts the pixels of a mask cell as channels.

    onnxruntime keeps the features in the order of its convolutions for that.
    """

    def __init__(self, conv: nn.ConvTranspose2d) -> None:
        super().__init__()
        self.scale = conv.stride[0]
        # (in, out, k, k) to (out k k, in, 1, 1), the order of F.pixel_shuffle.
        self.weight = nn.Parameter(conv.weight.detach().flatten(1).T[:, :, None, None].contiguous())
        self.bias = nn.Parameter(conv.get_parameter("bias").detach().repeat_interleave(self.scale**2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(F.conv2d(x, self.weight, self.bias), self.scale)


def _has_no_overlap(conv: nn.ConvTranspose2d) -> bool:
    return conv.kernel_size == conv.stride == (conv.stride[0],) * 2 and conv.groups == 1 and conv.bias is not None


def with_traceable_operators(roi_heads: MNCROIHeads) -> MNCROIHeads:
    """Copy the heads, with operators in place of some that torch.export or onnxruntime do badly."""
    roi_heads = copy.deepcopy(roi_heads)
    roi_heads.pooler = StackedPooler(roi_heads.pooler.pooler, roi_heads.pooler.in_features)
    for name, module in list(roi_heads.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.AdaptiveMaxPool2d):
            setattr(roi_heads.get_submodule(parent), child, ChannelwiseMaxPool2d(cast(int, module.output_size)))
        elif isinstance(module, nn.ConvTranspose2d) and _has_no_overlap(module):
            setattr(roi_heads.get_submodule(parent), child, _PixelShuffledConv2d(module))
    return roi_heads


def with_fixed_padding(backbone: Backbone) -> Backbone:
    """Copy a backbone, with convolutions whose padding does not depend on the size of their input.

    timm's ``Conv2dSame`` works out its padding from the size. Where images are padded to multiples of the largest
    stride it is always the same, and tracing it would take minutes.
    """
    strides = [x.stride for x in getattr(backbone, "bottom_up", backbone).output_shape().values()]
    if backbone.size_divisibility < max(strides):
        return backbone
    backbone = copy.deepcopy(backbone)
    for name, module in list(backbone.named_modules()):
        if type(module).__name__ == "Conv2dSame":
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, _PaddedConv2d(module))
    return backbone


class _PaddedConv2d(nn.Module):
    """A ``Conv2dSame`` for inputs whose size is a multiple of its stride."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.padding = []
        for kernel, dilation, stride in reversed(list(zip(conv.kernel_size, conv.dilation, conv.stride))):
            total = max((kernel - 1) * dilation + 1 - stride, 0)
            self.padding += [total // 2, total - total // 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        return F.conv2d(F.pad(x, self.padding), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def check_exportable(model: MultitaskNetworkCascade) -> None:
    """Raise a ValueError that names what of a model cannot be exported."""
    if type(model) is not MultitaskNetworkCascade:
        raise ValueError(f"Models of MODEL.META_ARCHITECTURE {type(model).__name__} cannot be exported.")
    rpn, heads = model.proposal_generator, model.roi_heads
    if not isinstance(rpn, RPN) or type(rpn.anchor_generator) is not DefaultAnchorGenerator:
        raise ValueError("Only models with an RPN, and Detectron2's DefaultAnchorGenerator, can be exported.")
    if type(heads) is not MNCROIHeads or type(heads.pooler) is not CascadePooler:
        raise ValueError(f"Models of MODEL.ROI_HEADS.NAME {type(heads).__name__} cannot be exported.")
    warp = heads.pooler.pooler
    if type(warp) is not RoIWarpPooler or warp.sampling != "center":
        raise ValueError('Only models whose RoIWarpPooler samples at "center" can be exported.')
    if not heads.mask_on:
        raise ValueError("Models with MODEL.MASK_ON False cannot be exported: the results are those of mask voting.")
    if isinstance(model.backbone, VGG16):
        # Whether an image is so low that its last row stays would be a condition of the graph.
        raise ValueError("Models with the backbone VGG16 cannot be exported.")
    if any(isinstance(x, FrozenBatchNorm2d) for x in heads.modules()):
        # torch.export would have to know whether there are RoIs.
        raise ValueError("Models with frozen batch normalisation in the heads, as Res5BoxHead has, cannot be exported.")
    if model.backbone.padding_constraints.get("square_size", 0) > 0:
        raise ValueError("Models whose backbone takes square images only cannot be exported.")
