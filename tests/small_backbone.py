"""A backbone that is built, trained and saved in a fraction of the time of the quickstart's ResNet-18."""

from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

# Of the residual blocks at the strides 4, 8, 16 and 32; those of the first are those of the stem too.
CHANNELS = {"res2": 32, "res3": 64, "res4": 96, "res5": 128}


@BACKBONE_REGISTRY.register()
def build_small_fpn_backbone(cfg, input_shape):
    """One residual block at each stride, and Detectron2's pyramid on top."""
    norm, widths = cfg.MODEL.RESNETS.NORM, list(CHANNELS.values())
    stages = [
        [BasicBlock(before, width, stride=1 if before == width else 2, norm=norm)]
        for before, width in zip([widths[0], *widths], widths)
    ]
    stem = BasicStem(input_shape.channels, widths[0], norm)
    resnet = ResNet(stem, stages, out_features=list(CHANNELS), freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
    return FPN(resnet, list(CHANNELS), cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM, LastLevelMaxPool())
