"""Instance segmentation by a model that `mnc export MODEL --format onnx` wrote.

It needs this one file, the .onnx file, and the packages numpy, pillow and onnxruntime:

    python client.py model.onnx photograph.jpg --output results.json

    from client import Predictor
    result = Predictor("model.onnx")(image)  # uint8 (H, W, 3), RGB
    result["boxes"], result["scores"], result["classes"], result["masks"]
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

METADATA_KEY = "mnc_d2"
# Elements that are rendered at once in mask voting: what bounds its memory.
_MAX_RENDERED = 2**22


class Predictor:
    """Finds instances in images.

    Attributes:
        settings: what the file says of the model: "class_names", "category_ids", "input", "voting".
        session: the onnxruntime session.
    """

    def __init__(self, path: str, *, threads: int = 0, providers: list[str] | None = None) -> None:
        """
        Args:
            path: the .onnx file.
            threads: of onnxruntime; 0 for one per core.
            providers: of onnxruntime, such as ["CUDAExecutionProvider"]; the CPU by default.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a model that `mnc export` wrote.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"The model {path} does not exist.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers or ["CPUExecutionProvider"])
        except Exception as error:  # the exceptions of onnxruntime have no common base of their own
            raise ValueError(f"onnxruntime cannot load the model {path}: {error}") from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise ValueError(f"The model {path} was not written by mnc export: it does not say what it needs.")
        self.settings = json.loads(metadata[METADATA_KEY])

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Find the instances of an image.

        Args:
            image: uint8 (H, W, 3), RGB.

        Returns:
            of D instances, best first: "boxes" (D, 4), float32, x1, y1, x2, y2 in pixels of the image; "scores" (D,),
            float32; "classes" (D,), int64, indices of the class names; "masks" (D, H, W), bool.
        """
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"An image must be uint8 (H, W, 3), got {image.dtype} {image.shape}.")
        network_input = self.prepare(image)
        boxes, scores, masks, class_boxes = self.run(network_input)
        detections = vote_masks(boxes, scores, masks, class_boxes, network_input.shape[1:], **self.settings["voting"])
        return paste_detections(
            detections, network_input.shape[1:], image.shape[:2], self.settings["voting"]["mask_threshold"]
        )

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Resize an image, uint8 (H, W, 3), RGB, as the model wants it: float32 (3, H', W'), 0 to 255."""
        rule = self.settings["input"]
        height, width = network_size(image.shape[:2], rule["short_side"], rule["long_side"])
        if (height, width) != image.shape[:2]:
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        if rule["format"] == "BGR":
            image = image[:, :, ::-1]
        return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)

    def run(self, network_input: np.ndarray) -> list[np.ndarray]:
        """Run the network on float32 (3, H', W'): boxes, scores, masks and class boxes, as :func:`vote_masks` takes."""
        return self.session.run(["boxes", "scores", "masks", "class_boxes"], {"image": network_input})


def network_size(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Return the (height, width) that an image of a (height, width) is resized to.

    Its short side becomes ``short_side`` pixels, or less, but never 0, where the long side would be longer than
    ``long_side``. A ``short_side`` of 0 is for images that keep their size.
    """
    height, width = size
    if short_side == 0:
        return height, width
    scale = short_side / min(size)
    # In this order, for the same rounding: Detectron2's.
    new_height, new_width = (short_side, scale * width) if height < width else (scale * height, short_side)
    if max(new_height, new_width) > long_side:
        scale = long_side / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


# ---- mask voting


def vote_masks(
    boxes: np.ndarray,
    scores: np.ndarray,
    masks: np.ndarray,
    class_boxes: np.ndarray,
    image_size: tuple[int, int],
    *,
    score_threshold: float,
    nms_threshold: float,
    voting_iou_threshold: float,
    mask_threshold: float,
    max_detections: int,
    detection_box: str,
) -> dict[str, np.ndarray]:
    """Reduce the candidates of one image to detections, as ``mnc_d2.modeling.vote_masks`` does.

    Boxes that survive a class-wise NMS are the detections. The mask of each is the average of the masks of all
    candidates whose box overlaps it, weighted by their score for its class, pixel by pixel.

    Args:
        boxes: (K, 4), float32, x1, y1, x2, y2 in pixels of the network's input.
        scores: (K, C), float32, probability of each class.
        masks: (K, m, m), float32, probabilities in the frame of the box.
        class_boxes: (K, 4 C), float32, each candidate regressed for each class.
        image_size: (height, width) of the network's input.
        score_threshold: candidates survive only with a higher score.
        nms_threshold: a box is suppressed by a better one of its class whose IoU with it is greater.
        voting_iou_threshold: candidates whose box has at least this IoU to a survivor vote for its mask.
        mask_threshold: a pixel belongs to a detection from this averaged probability on.
        max_detections: over all classes; negative for no limit.
        detection_box: the box of a detection: "tight", around the pixels of its mask; or "regressed", the average of
            ``class_boxes``, weighted as the masks are.

    Returns:
        of D detections, highest score first: "boxes" (D, 4), float32, "scores" (D,), "classes" (D,), int64, and "masks"
        (D, m, m), float32, the averaged probabilities in the frame of "mask_boxes" (D, 4): the tight boxes.
    """
    finite = [np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in (boxes, scores, masks, class_boxes)]
    given = np.logical_and.reduce(finite)
    if not given.all():
        boxes, scores, masks, class_boxes = (x[given] for x in (boxes, scores, masks, class_boxes))
    survivors, classes = select_detections(boxes, scores, score_threshold, nms_threshold, max_detections)
    count = len(survivors)

    ious = pairwise_iou(boxes[survivors], boxes)  # (D, K)
    votes = ious >= np.float32(voting_iou_threshold)
    votes[np.arange(count), survivors] = True  # a box without area has no IoU, not even with itself
    weights = scores[:, classes].T * votes
    weights /= weights.sum(axis=1, keepdims=True)

    mask_boxes = np.zeros((count, 4), dtype=np.float32)
    merged_masks = np.zeros((count, *masks.shape[1:]), dtype=np.float32)
    groups = group_detections(ious[:, survivors], voting_iou_threshold)
    for members in groups:
        voters = votes[members].any(axis=0).nonzero()[0]
        region = find_region(boxes[voters], image_size)
        merged = merge_masks(boxes[voters], masks[voters], weights[np.ix_(members, voters)], region)
        for i, values in zip(members, merged):
            box = find_tight_box(values >= np.float32(mask_threshold), region)
            mask_boxes[i] = clip_boxes(boxes[survivors[i]], image_size) if box is None else box
            merged_masks[i] = sample_box(values, mask_boxes[i] - np.tile(region[:2], 2), masks.shape[1])

    reported = mask_boxes
    if detection_box == "regressed":
        of_class = class_boxes.reshape(len(class_boxes), scores.shape[1], 4).transpose(1, 0, 2)[classes]  # (D, K, 4)
        reported = clip_boxes((weights[:, None] @ of_class)[:, 0], image_size)
    return {
        "boxes": reported,
        "scores": scores[survivors, classes],
        "classes": classes,
        "masks": merged_masks,
        "mask_boxes": mask_boxes,
    }


def select_detections(
    boxes: np.ndarray, scores: np.ndarray, score_threshold: float, nms_threshold: float, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Class-wise NMS of boxes (K, 4) that all classes share, scores (K, C).

    Returns:
        the best survivors, at most ``limit`` if it is not negative, highest score first: indices into ``boxes`` (D,),
        and classes (D,); int64.
    """
    candidates, classes = np.nonzero(scores > np.float32(score_threshold))
    order = np.argsort(-scores[candidates, classes], kind="stable")
    suppressed = np.zeros(scores.shape, dtype=bool)
    boxes = boxes.astype(np.float64)
    chosen: list[int] = []
    for i in order:
        if len(chosen) == limit:
            break
        box, cls = candidates[i], classes[i]
        if not suppressed[box, cls]:
            chosen.append(i)
            suppressed[:, cls] |= pairwise_iou(boxes[box : box + 1], boxes)[0] > nms_threshold
    rows = np.array(chosen, dtype=np.int64)
    return candidates[rows], classes[rows]


def group_detections(ious: np.ndarray, threshold: float) -> list[np.ndarray]:
    """Group detections, best first, around the best of those near one another: they have mostly the same voters.

    Args:
        ious: (D, D), of their boxes.
        threshold: a detection with a greater IoU to a better one starts no group.

    Returns:
        the indices of the members of each group.
    """
    seeds: list[int] = []
    for i, row in enumerate(ious):
        if not (row[seeds] > threshold).any():
            seeds.append(i)
    if not seeds:
        return []
    nearest = ious[:, seeds].argmax(axis=1)
    nearest[seeds] = np.arange(len(seeds))
    return [(nearest == group).nonzero()[0] for group in range(len(seeds))]


def find_region(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return the part of the image, x1, y1, x2, y2 in whole pixels, that holds boxes (n, 4) and a pixel around them."""
    limit = np.array(image_size[::-1])
    start = np.clip(np.floor(boxes[:, :2].min(axis=0)) - 1, 0, limit - 1)
    end = np.maximum(np.minimum(np.ceil(boxes[:, 2:].max(axis=0)) + 1, limit), start + 1)
    return np.concatenate((start, end)).astype(np.int64)


def merge_masks(boxes: np.ndarray, masks: np.ndarray, weights: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Average masks in the image.

    A pixel belongs to a box if its centre lies inside, and takes the value of the mask there, bilinearly between the
    centres of the mask cells.

    Args:
        boxes: (n, 4), float32.
        masks: (n, m, m), float32, in the frames of the boxes.
        weights: (D, n), float32.
        region: where, as :func:`find_region` returns it.

    Returns:
        (D, height of the region, width of the region), float32.
    """
    x1, y1, x2, y2 = region
    across = cell_weights(boxes[:, 0], boxes[:, 2], np.arange(x1, x2), masks.shape[2])  # (n, w, m)
    down = cell_weights(boxes[:, 1], boxes[:, 3], np.arange(y1, y2), masks.shape[1])  # (n, h, m)
    stretched = masks @ across.transpose(0, 2, 1)  # (n, m, w)
    merged = np.empty((len(weights), y2 - y1, x2 - x1), dtype=np.float32)
    strip = max(1, _MAX_RENDERED // (len(boxes) * (x2 - x1)))
    for start in range(0, y2 - y1, strip):
        rows = slice(start, start + strip)
        rendered = down[:, rows] @ stretched  # (n, strip, w)
        merged[:, rows] = (weights @ rendered.reshape(len(boxes), -1)).reshape(len(weights), -1, x2 - x1)
    return merged


def cell_weights(start: np.ndarray, end: np.ndarray, pixels: np.ndarray, size: int) -> np.ndarray:
    """Return what each of ``size`` cells, in boxes from start (n,) to end (n,), adds to pixels (w,): (n, w, size)."""
    centers = (pixels + 0.5).astype(np.float32)
    start, end = start[:, None], end[:, None]
    inside = (centers >= start) & (centers < end)
    with np.errstate(over="ignore"):  # of boxes without extent, which no pixel is inside of
        position = (centers - start) * size / np.maximum(end - start, np.finfo(np.float32).tiny) - np.float32(0.5)
    position = np.minimum(np.maximum(position, 0), size - 1)
    cells = position[:, :, None] - np.arange(size, dtype=np.float32)  # the distance, and in its place what it gives
    np.abs(cells, out=cells)
    np.subtract(1, cells, out=cells)
    np.maximum(cells, 0, out=cells)
    cells *= inside[:, :, None]
    return cells


def find_tight_box(occupied: np.ndarray, region: np.ndarray) -> np.ndarray | None:
    """Return the box, float32, around the pixels (h, w), bool, of a region of the image; None if there is none."""
    rows, columns = (np.flatnonzero(occupied.any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return None
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    return (np.array(box) + np.tile(region[:2], 2)).astype(np.float32)


def sample_box(values: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Sample a map (h, w) bilinearly at the centres of ``size`` x ``size`` bins of a box in it."""
    x1, y1, x2, y2 = box.astype(np.float32)
    down, across = (
        sample_axis(start, end, size, length)
        for start, end, length in ((y1, y2, len(values)), (x1, x2, values.shape[1]))
    )
    return down @ values @ across.T


def sample_axis(start: float, end: float, size: int, length: int) -> np.ndarray:
    """Return the weights (size, length) of the pixels of an axis in ``size`` samples of [start, end)."""
    bins = np.arange(size, dtype=np.float32) + np.float32(0.5)
    position = np.clip(start + bins * ((end - start) / size) - np.float32(0.5), 0, length - 1)
    return np.maximum(1 - np.abs(position[:, None] - np.arange(length, dtype=np.float32)), 0)


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoUs (D, K) of boxes (D, 4) and (K, 4); 0 where they have no area in common."""
    sides = (
        np.minimum(first[:, i + 2, None], second[:, i + 2]) - np.maximum(first[:, i, None], second[:, i])
        for i in range(2)
    )
    width, height = (np.maximum(side, 0) for side in sides)
    intersection = width * height
    areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (first, second)]
    union = areas[0][:, None] + areas[1] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)


def clip_boxes(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Clip boxes (..., 4) to an image of (height, width)."""
    height, width = image_size
    return np.clip(boxes, 0, np.array([width, height, width, height], dtype=boxes.dtype))


# ---- results in the image


def paste_detections(
    detections: dict[str, np.ndarray], network_size: tuple[int, int], image_size: tuple[int, int], threshold: float
) -> dict[str, np.ndarray]:
    """Bring detections of :func:`vote_masks` to the size of the image; those without extent there are left out.

    Args:
        detections: in pixels of the network's input.
        network_size, image_size: (height, width).
        threshold: pixels belong to a mask from this probability on.

    Returns:
        as :class:`Predictor` does.
    """
    factors = [image / network for image, network in zip(image_size[::-1], network_size[::-1])]
    scale = np.array(factors * 2, dtype=np.float32)
    mask_boxes, boxes = (clip_boxes(detections[key] * scale, image_size) for key in ("mask_boxes", "boxes"))
    kept = ((mask_boxes[:, 2:] - mask_boxes[:, :2]) > 0).all(axis=1).nonzero()[0]
    masks = np.zeros((len(kept), *image_size), dtype=bool)
    for mask, i in zip(masks, kept):
        paste_mask(detections["masks"][i], mask_boxes[i], threshold, mask)
    return {
        "boxes": boxes[kept],
        "scores": detections["scores"][kept],
        "classes": detections["classes"][kept],
        "masks": masks,
    }


def paste_mask(mask: np.ndarray, box: np.ndarray, threshold: float, out: np.ndarray) -> None:
    """Set the pixels of an image, bool (H, W), where a mask (m, m) in the frame of a box has the threshold.

    As Detectron2 does: bilinearly between the centres of mask cells, with zeros around the mask.
    """
    height, width = out.shape
    x1, y1 = np.maximum(np.floor(box[:2]).astype(np.int64) - 1, 0)
    x2, y2 = np.minimum(np.ceil(box[2:]).astype(np.int64) + 1, (width, height))
    across = cell_weights_with_zeros_around(box[0], box[2], np.arange(x1, x2), mask.shape[1])
    down = cell_weights_with_zeros_around(box[1], box[3], np.arange(y1, y2), mask.shape[0])
    out[y1:y2, x1:x2] = down @ mask @ across.T >= np.float32(threshold)


def cell_weights_with_zeros_around(start: float, end: float, pixels: np.ndarray, size: int) -> np.ndarray:
    """Return what each of ``size`` mask cells of [start, end) adds to pixels (w,), also just outside: (w, size)."""
    position = ((pixels + 0.5).astype(np.float32) - start) / (end - start) * size - np.float32(0.5)
    return np.maximum(1 - np.abs(position[:, None] - np.arange(size, dtype=np.float32)), 0)


# ---- files


def read_image(path: str) -> np.ndarray:
    """Read an image, turned as its EXIF data say: uint8 (H, W, 3), RGB. Deep grey values are stretched to 8 bits."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            values = np.asarray(image, dtype=np.float64)
            low, high = values.min(), values.max()
            image = Image.fromarray(np.round((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8))
        elif image.mode in ("P", "PA"):
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))


def encode_rle(mask: np.ndarray) -> dict:
    """Encode a mask (H, W), bool, as COCO's compressed run lengths: {"size": [H, W], "counts": str}."""
    pixels = np.concatenate(([False], mask.ravel(order="F")))
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    runs = np.diff(np.concatenate(([0], changes, [mask.size])))
    runs[3:] -= runs[1:-2].copy()  # from the fourth on, as the difference to the second before
    return {"size": list(mask.shape), "counts": "".join(map(_encode_number, runs.tolist()))}


def _encode_number(value: int) -> str:
    """Five bits a character, lowest first; the sixth says that more follow."""
    characters = []
    while True:
        bits, value = value & 31, value >> 5
        done = value == (-1 if bits & 16 else 0)
        characters.append(chr((bits if done else bits | 32) + 48))
        if done:
            return "".join(characters)


def to_annotations(result: dict[str, np.ndarray], image_id: int, category_ids: list[int]) -> list[dict]:
    """Return the instances of an image as annotations in COCO format."""
    annotations = []
    for box, score, cls, mask in zip(result["boxes"], result["scores"], result["classes"], result["masks"]):
        x1, y1, x2, y2 = box.tolist()
        annotations.append(
            {
                "image_id": image_id,
                "category_id": category_ids[cls],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "score": float(score),
                "segmentation": encode_rle(mask),
            }
        )
    return annotations


def draw_labels(masks: np.ndarray) -> Image.Image:
    """Return masks (D, H, W), best first, as one image of 16 bits: n where the n-th is the best of a pixel, else 0."""
    labels = np.zeros(masks.shape[1:], dtype=np.uint16)
    for label in range(len(masks), 0, -1):
        labels[masks[label - 1]] = label
    return Image.fromarray(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument(
        "--output",
        required=True,
        help="a .json file, in COCO format; or a folder, for a PNG of the masks of each image",
    )
    parser.add_argument(
        "--score", type=float, default=0.5, help="of the instances that count, at least; 0.5 by default"
    )
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime; one per core by default")
    args = parser.parse_args()
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"client.py: {error}")


def run(args: argparse.Namespace) -> None:
    """Predict on all images and write the results."""
    predictor = Predictor(args.model, threads=args.threads)
    as_json = args.output.endswith(".json")
    stems = [os.path.splitext(os.path.basename(path))[0] for path in args.images]
    if not as_json:
        twice = sorted({stem for stem in stems if stems.count(stem) > 1})
        if twice:
            raise ValueError(f"Masks of several images would be {twice[0]}.png. Predict them in several calls.")
    os.makedirs(os.path.dirname(args.output) or "." if as_json else args.output, exist_ok=True)
    names, ids = predictor.settings["class_names"], predictor.settings["category_ids"]
    content = {"images": [], "categories": [{"id": i, "name": x} for i, x in zip(ids, names)], "annotations": []}
    for image_id, path in enumerate(args.images, start=1):
        image = read_image(path)
        result = predictor(image)
        result = {key: values[result["scores"] >= args.score] for key, values in result.items()}
        if as_json:
            height, width = image.shape[:2]
            content["images"].append({"id": image_id, "file_name": path, "height": height, "width": width})
            content["annotations"] += to_annotations(result, image_id, ids)
        else:
            draw_labels(result["masks"]).save(os.path.join(args.output, f"{stems[image_id - 1]}.png"))
    for annotation_id, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = annotation_id
    if as_json:
        with open(f"{args.output}.partial", "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(f"{args.output}.partial", args.output)


if __name__ == "__main__":
    main()
