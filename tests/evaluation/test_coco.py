"""COCO AP by faster-coco-eval and by pycocotools: the same numbers."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BitMasks, Boxes, Instances

from mnc_d2.evaluation import FasterCOCOEvaluator, SDSEvaluator, coco
from mnc_d2.modeling.mask_pasting import RLEMasks

pytestmark = pytest.mark.usefixtures("clean_catalogs")
needs_package = pytest.mark.skipif(coco.COCOeval_faster is None, reason="faster-coco-eval is not installed")
H, W = 200, 240
IDS = {3: 0, 7: 1, 9: 2}  # category ids of the file by class


def blobs(generator, number):
    """Ellipses of 4 to 160 pixels: small, medium and large ones."""
    y, x = np.mgrid[:H, :W]
    centres, radii = generator.random((number, 2)) * (W, H), 2 + 78 * generator.random((number, 2)) ** 2
    return [((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1 for (cx, cy), (rx, ry) in zip(centres, radii)]


@pytest.fixture
def dataset(tmp_path):
    """Twenty images, some without instances, with crowd regions; and predictions, some of them right."""
    generator = np.random.default_rng(0)
    images, annotations, predictions = [], [], {}
    for image in range(1, 21):
        images.append({"id": image, "file_name": f"{image}.png", "height": H, "width": W})
        masks = [mask for mask in blobs(generator, image % 6) if mask.any()]
        classes = generator.integers(0, 3, size=len(masks))
        for mask, cls in zip(masks, classes.tolist()):
            rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": list(IDS)[cls],
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "area": int(mask.sum()),
                    "iscrowd": int(generator.random() < 0.15),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
        shifted = [np.roll(mask, generator.integers(-6, 7), axis=1) for mask in masks * 3] + blobs(generator, 5)
        found = Instances((H, W))
        found.pred_masks = torch.tensor(np.array(shifted))
        found.pred_boxes = BitMasks(found.pred_masks).get_bounding_boxes()
        found.scores = torch.tensor(generator.integers(0, 20, size=len(shifted)) / 20)  # some of them equal
        found.pred_classes = torch.tensor([*np.tile(classes, 3), *generator.integers(0, 3, size=5)])
        predictions[image] = found
    path = tmp_path / "annotations.json"
    categories = [{"id": i, "name": name} for i, name in zip(IDS, "abc")]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    metadata = MetadataCatalog.get("random")
    metadata.set(json_file=str(path), thing_classes=list("abc"), thing_dataset_id_to_contiguous_id=IDS)
    return predictions


def evaluate(evaluator, predictions, **kwargs):
    evaluator.reset()
    for image, found in predictions.items():
        evaluator.process([{"image_id": image}], [{"instances": found}])
    return evaluator.evaluate(**kwargs)


def assert_same(actual, expected):
    assert list(actual) == list(expected) == ["bbox", "segm"][: len(expected)]
    for task, scores in expected.items():
        assert actual[task] == pytest.approx(scores, abs=1e-9, nan_ok=True), task  # another order of summation


@pytest.fixture
def calls(monkeypatch):
    """Counts evaluations by faster-coco-eval."""
    calls, compare = [], FasterCOCOEvaluator._compare

    def counted(self, results, task, img_ids):
        calls.append(task)
        return compare(self, results, task, img_ids)

    monkeypatch.setattr(FasterCOCOEvaluator, "_compare", counted)
    return calls


@needs_package
@pytest.mark.parametrize(
    "arguments",
    [{}, {"tasks": ("bbox",)}, {"max_dets_per_image": 12}, {"max_dets_per_image": 300}],
    ids=["both tasks", "boxes", "12 detections", "300 detections"],
)
def test_both_ways_give_the_same_numbers(dataset, tmp_path, calls, arguments):
    expected = evaluate(COCOEvaluator("random", output_dir=str(tmp_path / "a"), **arguments), dataset)
    assert calls == []
    actual = evaluate(FasterCOCOEvaluator("random", output_dir=str(tmp_path / "b"), **arguments), dataset)
    assert calls == list(expected)
    assert_same(actual, expected)
    for scores in expected.values():
        assert 5 < scores["AP"] < 95 and {"APs", "APm", "APl", "AP-a", "AP-b", "AP-c"} < set(scores)
    results = [json.loads((tmp_path / x / "coco_instances_results.json").read_text()) for x in "ab"]
    assert results[0] == results[1]


@needs_package
def test_both_ways_give_the_same_numbers_for_some_images(dataset, calls):
    expected, actual = (
        evaluate(kind("random"), dataset, img_ids=[3, 4, 5, 11]) for kind in (COCOEvaluator, FasterCOCOEvaluator)
    )
    assert calls == ["bbox", "segm"]
    assert_same(actual, expected)
    assert actual["bbox"]["AP"] != evaluate(COCOEvaluator("random"), dataset)["bbox"]["AP"]


@needs_package
def test_no_predictions_are_nan_both_ways(dataset):
    nothing = Instances((H, W))
    nothing.pred_boxes, nothing.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
    nothing.pred_classes = torch.zeros(0, dtype=torch.int64)
    expected, actual = (evaluate(kind("random"), {1: nothing}) for kind in (COCOEvaluator, FasterCOCOEvaluator))
    assert list(actual) == list(expected) == ["bbox"]
    assert all(np.isnan(x) for scores in (*actual.values(), *expected.values()) for x in scores.values())


@needs_package
def test_class_that_does_not_exist_names_the_image(dataset):
    dataset[4].pred_classes[0] = 3
    with pytest.raises(ValueError, match="image 4 is of class 3; classes are 0 to 2"):
        evaluate(FasterCOCOEvaluator("random"), dataset)


def test_without_the_package_it_is_detectron2s_evaluator(dataset, calls, monkeypatch):
    monkeypatch.setattr(coco, "COCOeval_faster", None)
    actual = evaluate(FasterCOCOEvaluator("random"), dataset)
    assert calls == []
    assert_same(actual, evaluate(COCOEvaluator("random"), dataset))


def test_image_ids_that_are_no_integers_are_left_to_detectron2(dataset, calls, tmp_path):
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"
    path.write_text(json.dumps(content))
    named = {f"image {image}": found for image, found in dataset.items()}
    assert_same(evaluate(FasterCOCOEvaluator("random"), named), evaluate(COCOEvaluator("random"), named))
    assert calls == []


@pytest.mark.parametrize("evaluator", [FasterCOCOEvaluator, SDSEvaluator])
def test_masks_may_be_run_lengths(dataset, evaluator):
    expected = evaluate(evaluator("random"), dataset)
    encoded = {image: found.to("cpu") for image, found in dataset.items()}
    for found in encoded.values():
        pixels = found.pred_masks.numpy().view(np.uint8)
        found.remove("pred_masks")
        found.pred_masks_rle = RLEMasks([mask_util.encode(np.asfortranarray(x)) for x in pixels], (H, W))
    found = evaluate(evaluator("random"), encoded)
    assert list(found) == list(expected) and len(found) == 2
    for task, scores in expected.items():
        assert found[task] == pytest.approx(scores, abs=1e-9, nan_ok=True)
