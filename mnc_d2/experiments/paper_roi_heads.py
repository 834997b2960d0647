"""The cascade with the sampling rules of the authors' code."""

from __future__ import annotations

from functools import partial

from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY

from ..modeling import MNCROIHeads


@ROI_HEADS_REGISTRY.register()
class PaperMNCROIHeads(MNCROIHeads):
    """The cascade with three rules of the released code.

    Ground-truth boxes join the boxes of every pass in training. Bands of background RoIs do not make up for one
    another. At inference, background may be the class that regresses a box for the next pass.
    """

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        arguments = super().from_config(cfg, input_shape)
        return {
            **arguments,
            "sample": partial(arguments["sample"], refill=False),
            "append_gt_to_later_passes": True,
            "next_box_background": True,
        }
