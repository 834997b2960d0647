"""What SDSEvaluator reads, ground truth of all kinds, and what it says of bad ground truth and bad predictions."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes
from evaluation.sds_inputs import H, W, annotation, evaluate, instances, nothing, rectangle, register

from mnc_d2.data import register_coco_dataset
from mnc_d2.evaluation import SDSEvaluator
from mnc_d2.evaluation.ground_truth import load_ground_truth

pytestmark = pytest.mark.usefixtures("clean_catalogs")


# ---- ground truth of all kinds


def test_a_file_in_coco_format_and_records_give_the_same(coco_dataset):
    path, root = coco_dataset
    register_coco_dataset("file", path, root)
    records = DatasetCatalog.get("file")
    DatasetCatalog.register("records", lambda: records)
    MetadataCatalog.get("records").set(thing_classes=["disc", "square"])
    generator = torch.Generator().manual_seed(0)
    predictions = {}
    for record in records:
        masks = [mask_util.decode(x["segmentation"]).astype(bool) for x in record["annotations"]]
        masks = [np.roll(mask, 3 * k, axis=0) for k in range(3) for mask in masks]
        classes = [x["category_id"] for x in record["annotations"]] * 3
        predictions[record["image_id"]] = instances(masks, torch.rand(len(masks), generator=generator), classes)
    results = evaluate(predictions, "file")
    assert results == evaluate(predictions, "records")
    assert 0 < results["sds"]["mAPr@70"] < 100


def test_polygons_and_uncompressed_masks_are_read(tmp_path):
    polygon = [[5, 5, 25, 5, 25, 15, 5, 15], [1, 1]]  # the second one, degenerate, is left out
    uncompressed = {"size": [H, W], "counts": [20 * H, 10 * H, 30 * H]}  # columns 20 to 29
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [5, 5, 20, 10], "segmentation": polygon},
        {"id": 2, "image_id": 7, "category_id": 9, "segmentation": uncompressed},  # its box is that of the mask
    ]
    path = tmp_path / "annotations.json"
    images = [{"id": 7, "file_name": "7.png", "height": H, "width": W}]
    categories = [{"id": 9, "name": "late"}, {"id": 3, "name": "early"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    MetadataCatalog.get("file").set(json_file=str(path))
    found = instances([rectangle(5, 5, 25, 15), rectangle(20, 0, 30, H)], [0.9, 0.8], [0, 1])
    results = evaluate({7: found}, "file", output_dir=str(tmp_path / "out"))
    assert results["sds"]["mAPr@70-early"] == results["sds"]["mAPr@70-late"] == pytest.approx(100.0)
    assert results["bbox"]["AP"] == pytest.approx(100.0)
    # Predictions are written with the ids of the file.
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == "coco_instances_results.json"
    first, second = json.loads(written.read_text())
    assert (first["image_id"], first["category_id"], second["category_id"]) == (7, 3, 9)
    assert first["bbox"] == [5, 5, 20, 10] and first["score"] == pytest.approx(0.9)
    assert np.array_equal(mask_util.decode(second["segmentation"]), rectangle(20, 0, 30, H))


def test_flags_of_a_file_that_cocoevaluator_could_not_read_are_kept(coco_dataset, tmp_path):
    path, root = coco_dataset
    content = json.loads(path.read_text())
    for record in content["annotations"]:
        del record["area"]  # without which register_coco_dataset sets no json_file
        record["difficult"] = int(record["category_id"] == 1)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    register_coco_dataset("flagged", path, root)
    flags = {x.category: x.difficult for x in load_ground_truth("flagged").images[1].annotations}
    assert flags == {0: True, 1: False}


def test_no_predictions_are_written_as_an_empty_list(tmp_path):
    register({"x": []})
    evaluate({"x": nothing()}, output_dir=str(tmp_path))
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


# ---- bad input


def changed(**fields):
    found = instances([rectangle(0, 0, 20, 20)] * 2, [0.9, 0.8], [0, 1])
    for name, value in fields.items():
        found.set(name, value)
    return found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (changed(scores=torch.tensor([0.5, torch.nan])), "image 'x' of 'images' have scores that are not finite"),
        (changed(pred_boxes=Boxes(torch.full((2, 4), torch.inf))), "image 'x' of 'images' have boxes that are not"),
        (changed(pred_classes=torch.tensor([0, 4])), "image 'x' of 'images' are of class 4; classes are 0 to 3"),
        (changed(pred_classes=torch.tensor([-1, 0])), "are of class -1; classes are 0 to 3"),
        (changed(pred_masks=torch.ones(2, W, H, dtype=torch.bool)), "'x' .* masks of 60 x 40 pixels.* has 40 x 60"),
    ],
    ids=["NaN score", "infinite box", "class too large", "negative class", "mask of another size"],
)
def test_bad_predictions_name_the_image(found, message):
    register({"x": []})
    with pytest.raises(ValueError, match=message):
        evaluate({"x": found})


def test_image_that_is_unknown_or_comes_twice_is_named():
    register({"x": []})
    evaluator = SDSEvaluator("images")
    with pytest.raises(ValueError, match="image 'z', which is not in 'images'"):
        evaluator.process([{"image_id": "z"}], [{"instances": nothing()}])
    evaluator.process([{"image_id": "x"}], [{"instances": nothing()}])
    with pytest.raises(ValueError, match="image 'x' twice"):
        evaluator.process([{"image_id": "x"}], [{"instances": nothing()}])


def test_masks_that_only_some_predictions_have_are_an_error():
    register({"x": [], "y": []})
    found, bare = changed(), changed()
    bare.remove("pred_masks")
    with pytest.raises(ValueError, match="'images' have masks, but not those for the images y"):
        evaluate({"x": found, "y": bare})
    with pytest.raises(ValueError, match="image 'y' of 'images' have no pred_masks"):
        evaluate({"y": bare}, tasks=("sds",))


@pytest.mark.parametrize("tasks", [("sds", "bbox"), None])
def test_annotation_without_segmentation_is_named_where_masks_are_evaluated(tmp_path, tasks):
    annotations = [{"id": i, "image_id": "x", "category_id": 1, "bbox": [0, 0, 20, 20]} for i in (5, 6)]
    annotations[0]["segmentation"] = [[0, 0, 20, 0, 20, 20]]
    path = tmp_path / "annotations.json"
    images = [{"id": "x", "file_name": "x.png", "height": H, "width": W}]
    categories = [{"id": 1, "name": "a"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    MetadataCatalog.get("images").set(json_file=str(path))
    found = instances([rectangle(0, 0, 20, 20)], [0.9], [0])
    with pytest.raises(ValueError, match="1 annotations have no segmentation .*: annotation 6"):
        evaluate({"x": found}, tasks=tasks)
    assert set(evaluate({"x": found}, tasks=("bbox",))) == {"bbox"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 2}, "annotation 5 is of category 2"),
        ({"image_id": "y"}, "annotation 5 is of image 'y'"),
        ({"bbox": None}, "annotation 5 has neither bbox nor segmentation"),
        (
            {"segmentation": {"size": [9, 9], "counts": "abc"}},
            "annotation 5 has a mask of .9, 9., its image is 40 x 60",
        ),
    ],
)
def test_bad_annotation_is_named(tmp_path, change, message):
    record = {"id": 5, "image_id": "x", "category_id": 1, "bbox": [0, 0, 20, 20], **change}
    record = {key: value for key, value in record.items() if value is not None}
    images = [{"id": "x", "file_name": "x.png", "height": H, "width": W}]
    path = tmp_path / "annotations.json"
    content = {"images": images, "annotations": [record], "categories": [{"id": 1, "name": "a"}]}
    path.write_text(json.dumps(content))
    MetadataCatalog.get("images").set(json_file=str(path))
    with pytest.raises(ValueError, match=message):
        SDSEvaluator("images")


def test_ground_truth_without_annotations_is_an_error(tmp_path):
    path = tmp_path / "test-dev.json"
    path.write_text(json.dumps({"images": [], "categories": []}))
    MetadataCatalog.get("images").set(json_file=str(path))
    with pytest.raises(ValueError, match=r"test-dev\.json has no annotations"):
        SDSEvaluator("images")


def test_records_of_a_class_that_does_not_exist_are_an_error():
    register({"x": [annotation(rectangle(0, 0, 2, 2), 4)]})
    with pytest.raises(ValueError, match="annotation 0 of image 'x' is of class 4; there are 4 classes"):
        SDSEvaluator("images")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tasks": ("segm",)}, "tasks.*segm"), ({"tasks": ()}, "tasks"), ({"thresholds": [50]}, "thresholds.*50")],
)
def test_bad_arguments_are_named(arguments, message):
    register({"x": []})
    with pytest.raises(ValueError, match=message):
        SDSEvaluator("images", **arguments)
