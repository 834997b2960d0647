"""From the candidates of all passes to detections: by mask voting, or boxes alone (MNC_box)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Instances

from .output_layers import MNCOutputLayers
from .outputs import PassOutput, gather_by_image


def reduce_passes(
    passes: Sequence[PassOutput],
    image_sizes: Sequence[tuple[int, int]],
    outputs: Sequence[str],
    predictor: MNCOutputLayers,
    predict_class_boxes: Callable[[PassOutput], torch.Tensor],
    vote: Callable[..., Instances] | None,
) -> dict[str, list]:
    """Reduce the boxes of all passes to detections.

    Args:
        passes: one output per pass.
        image_sizes: (height, width) of each image.
        outputs: names of what to return.
        predictor: has the thresholds.
        predict_class_boxes: from the output of a pass on R boxes to a box for each foreground class, (R, 4 C).
        vote: reduces the candidates of one image, as :func:`~mnc_d2.modeling.vote_masks` does; None for results without
            masks.

    Returns:
        by name, one element per image: "instances", by mask voting, or box-level results without ``vote``;
        "box_instances", box-level results (MNC_box): class-specific boxes with box-level scores, after NMS; "passes", a
        list of what each pass predicts for its boxes, see :meth:`PassOutput.to_instances`.
    """

    def gather(quantity: Callable[[PassOutput], torch.Tensor]) -> list[torch.Tensor]:
        return gather_by_image(passes, quantity, len(image_sizes))

    results: dict[str, list] = {}
    class_boxes = gather(predict_class_boxes)
    if "box_instances" in outputs or vote is None:
        results["box_instances"], _ = fast_rcnn_inference(
            class_boxes,
            gather(lambda output: output.cls_probabilities),
            list(image_sizes),
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
    if vote is None:
        results["instances"] = results["box_instances"]
    else:
        candidates = zip(
            gather(lambda output: output.boxes),
            gather(lambda output: output.seg_cls_probabilities[:, : predictor.num_classes]),
            gather(lambda output: output.masks),
            image_sizes,
        )
        results["instances"] = [
            vote(
                *of_image,
                class_boxes=boxes,
                score_threshold=predictor.test_score_thresh,
                nms_threshold=predictor.test_nms_thresh,
                max_detections=predictor.test_topk_per_image,
            )
            for of_image, boxes in zip(candidates, class_boxes)
        ]
    if "passes" in outputs:
        results["passes"] = [list(x) for x in zip(*(output.to_instances(image_sizes) for output in passes))]
    return {name: results[name] for name in outputs}
