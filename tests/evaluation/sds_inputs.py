"""Small datasets and predictions for SDSEvaluator."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances

from mnc_d2.evaluation import SDSEvaluator

CLASSES = ["a", "b", "c", "d"]
H, W = 40, 60


def rle(mask):
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


def rectangle(x0, y0, x1, y1):
    mask = np.zeros((H, W), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def instances(masks, scores, classes, boxes=None):
    """Predictions as a model returns them; boxes are those of the masks unless given."""
    masks = torch.as_tensor(np.array(masks))
    result = Instances(tuple(masks.shape[1:]))
    result.pred_masks = masks
    result.pred_boxes = BitMasks(masks).get_bounding_boxes() if boxes is None else Boxes(boxes)
    result.scores = torch.as_tensor(scores)
    result.pred_classes = torch.as_tensor(classes, dtype=torch.int64)
    return result


def nothing(masks=True):
    result = Instances((H, W))
    result.pred_boxes, result.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
    result.pred_classes = torch.zeros(0, dtype=torch.int64)
    if masks:
        result.pred_masks = torch.zeros(0, H, W, dtype=torch.bool)
    return result


def annotation(mask, category, **flags):
    code = rle(mask)
    box = mask_util.toBbox(code).tolist()
    return {"category_id": category, "segmentation": code, "bbox": box, "bbox_mode": BoxMode.XYWH_ABS, **flags}


def register(images, name="images", size=(H, W), classes=CLASSES):
    """Register Detectron2's records: annotations by image id."""
    records = [
        {"file_name": f"{i}.png", "image_id": i, "height": size[0], "width": size[1], "annotations": annotations}
        for i, annotations in images.items()
    ]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=list(classes))
    return name


def evaluate(predictions, name="images", **kwargs):
    """Evaluate predictions by image id, an image at a time in the order of the dict."""
    evaluator = SDSEvaluator(name, **kwargs)
    for image_id, found in predictions.items():
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
    return evaluator.evaluate()
