"""mAP^r and VOC's box AP from predictions: golden figures, Detectron2's own code, order, processes, bad input."""

import json
import logging
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator, verify_results
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from detectron2.utils import comm

from mnc_d2.data import register_coco_dataset
from mnc_d2.engine import leave_process_group
from mnc_d2.evaluation import BoxLevelEvaluator, SDSEvaluator
from mnc_d2.evaluation.average_precision import best_overlaps, match
from mnc_d2.evaluation.ground_truth import load_ground_truth

pytestmark = pytest.mark.usefixtures("clean_catalogs")
GOLDEN = np.load(Path(__file__).with_name("golden_sds.npz"))
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


# ---- golden figures


@pytest.fixture(scope="module")
def golden():
    """The predictions of the golden case by image: masks, scores and classes from 0; and the ground truth alike."""
    masks = np.unpackbits(GOLDEN["pred_full_eval"], axis=2)[:, :, : GOLDEN["W"]].astype(bool)
    rows = {i: np.flatnonzero(GOLDEN["pred_image"] == i) for i in range(len(GOLDEN["gt_inst"]))}
    predictions = {
        i: instances(masks[r], GOLDEN["pred_score"][r], GOLDEN["pred_class"][r] - 1) for i, r in rows.items()
    }
    truth = {
        i: [annotation(labels == k, int(classes[k]) - 1) for k in range(1, labels.max() + 1)]
        for i, (labels, classes) in enumerate(zip(GOLDEN["gt_inst"], GOLDEN["gt_inst_class"]))
    }
    return truth, predictions


@pytest.fixture
def golden_dataset(golden):
    return register(golden[0], size=(int(GOLDEN["H"]), int(GOLDEN["W"])))


def test_golden_average_precisions(golden, golden_dataset):
    results = evaluate(golden[1])["sds"]
    for percent in (50, 70):
        expected = GOLDEN[f"ap_eval_{percent}"]
        actual = [results[f"mAPr@{percent}-{name}"] / 100 for name in CLASSES]
        assert actual == pytest.approx(expected.tolist(), abs=1e-9)
        # The class without predictions counts.
        assert results[f"mAPr@{percent}"] / 100 == pytest.approx(expected.mean(), abs=1e-9)


@pytest.mark.parametrize("percent", [50, 70])
def test_golden_true_positives(golden, percent):
    truth, _ = golden
    masks = np.unpackbits(GOLDEN["pred_full_eval"], axis=2)[:, :, : GOLDEN["W"]]
    everything = [x for i in truth for x in truth[i]]
    starts = np.cumsum([0, *(len(truth[i]) for i in truth)])
    flags, ious = np.zeros(len(masks), dtype=bool), np.zeros(len(masks))
    best = np.full(len(masks), -1)
    for row in range(len(masks)):
        image, cls = GOLDEN["pred_image"][row], GOLDEN["pred_class"][row] - 1
        same = [k for k in range(starts[image], starts[image + 1]) if everything[k]["category_id"] == cls]
        if same:
            (ious[row],), (index,) = best_overlaps([rle(masks[row])], [everything[k]["segmentation"] for k in same])
            best[row] = same[index]
    for cls in range(1, 5):
        rows = np.flatnonzero(GOLDEN["pred_class"] == cls)
        rows = rows[np.argsort(-GOLDEN["pred_score"][rows])]
        flags[rows], _ = match(ious[rows], best[rows], np.zeros(len(everything), dtype=bool), percent / 100)
    assert ious == pytest.approx(GOLDEN["iou_eval"], abs=1e-9)
    assert np.array_equal(flags, GOLDEN[f"tp_eval_{percent}"].astype(bool))


def test_golden_file_is_that_of_the_authors_protocol():
    path = Path(__file__).parents[3] / "shared" / "golden" / "sds_1.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    source = np.load(path)
    assert all(np.array_equal(GOLDEN[key], source[key]) for key in GOLDEN.files)


def test_volume_is_the_mean_over_nine_thresholds(golden, golden_dataset):
    results = evaluate(golden[1], thresholds=[k / 10 for k in range(1, 10)])["sds"]
    for kind in ("", "_area"):
        values = [results[f"mAPr{kind}@{10 * k}"] for k in range(1, 10)]
        assert len(set(values)) > 5
        assert results[f"mAPr{kind}_vol"] == pytest.approx(np.mean(values), abs=1e-9)


# ---- the same whatever the order


def test_images_in_another_order_give_the_same(golden, golden_dataset):
    expected = evaluate(golden[1])
    assert evaluate(dict(reversed(golden[1].items()))) == expected


@pytest.fixture
def tied():
    """Two images with predictions of equal score, some of them true positives; AP depends on who comes first."""
    generator = np.random.default_rng(0)
    truth, predictions = {}, {}
    for image in ("x", "y"):
        boxes = [(x, y, x + 10, y + 10) for x, y in ((2, 2), (30, 4), (20, 25))]
        truth[image] = [annotation(rectangle(*box), k % 2) for k, box in enumerate(boxes)]
        shifts = generator.integers(-3, 4, size=(12, 2))
        masks = [rectangle(x0 + dx, y0 + dy, x1, y1) for (dx, dy), (x0, y0, x1, y1) in zip(shifts, boxes * 4)]
        masks = [mask if mask.any() else rectangle(0, 0, 1, 1) for mask in masks]
        predictions[image] = instances(masks, [0.5] * 6 + [0.25] * 6, [0, 1, 0] * 4)
    register(truth)
    return truth, predictions


def test_equal_scores_in_another_order_give_the_same(tied):
    _, predictions = tied
    expected, untied = evaluate(predictions), set()
    for seed in range(5):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        shuffled = {image: found[order] for image, found in reversed(predictions.items())}
        assert evaluate(shuffled) == expected
        for found in shuffled.values():
            found.scores = found.scores - 0.001 * torch.arange(12)
        untied.add(evaluate(shuffled)["sds"]["mAPr@70"])
    assert len(untied) > 1  # were they ranked as they come, there would be several results


def run_process(rank, truth, predictions, folder):
    """One of two processes: an image each."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    register(truth)
    evaluator = BoxLevelEvaluator(SDSEvaluator("images", tasks=("bbox",)))
    evaluator.reset()
    image_id = list(predictions)[rank]
    evaluator.process([{"image_id": image_id}], [{"box_instances": predictions[image_id]}])
    # The first process has the second image.
    results = {**evaluate({image_id: predictions[image_id]}), **evaluator.evaluate()}
    # What is not distributed knows of its own image only.
    results["own"] = evaluate({image_id: predictions[image_id]}, distributed=False)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    leave_process_group()


def test_two_processes_give_the_same_as_one(tied, tmp_path):
    truth, predictions = tied
    backwards = dict(reversed(predictions.items()))
    mp.start_processes(run_process, (truth, backwards, tmp_path), nprocs=2, start_method="spawn")
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    expected = evaluate(predictions)
    own = main.pop("own")
    assert own == evaluate({"y": predictions["y"]}) != expected
    assert main == {**expected, "box_level_bbox": expected["bbox"]}
    assert list(other) == ["own"]


# ---- figures that are known


def test_perfect_predictions_give_100(golden, golden_dataset):
    truth, _ = golden
    predictions = {
        i: instances(
            [mask_util.decode(x["segmentation"]).astype(bool) for x in annotations],
            np.linspace(0.9, 0.5, len(annotations)),
            [x["category_id"] for x in annotations],
        )
        for i, annotations in truth.items()
        if annotations
    }
    results = evaluate(predictions)
    assert set(results) == {"sds", "bbox"}
    for task, scores in results.items():
        assert scores == pytest.approx(dict.fromkeys(scores, 100.0)), task
    assert {key for key in results["sds"] if "-" not in key} == {
        *("mAPr@50", "mAPr@70", "mAPr_vol", "mAPr_area@50", "mAPr_area@70", "mAPr_area_vol")
    }
    assert {key for key in results["bbox"] if "-" not in key} == {
        *("AP", "AP50", "AP75", "AP_11point", "AP50_11point", "AP75_11point")
    }


def test_an_image_without_annotations_has_false_positives_only():
    register({"x": [annotation(rectangle(0, 0, 20, 20), 0)], "empty": []}, classes=["a"])
    hit = instances([rectangle(0, 0, 20, 20)], [0.5], [0])
    miss = instances([rectangle(0, 0, 20, 20)], [0.9], [0])
    results = evaluate({"x": hit, "empty": miss})
    assert results["sds"]["mAPr@50"] == results["bbox"]["AP50"] == pytest.approx(50.0)


def test_a_class_without_instances_or_without_predictions_has_0_and_counts():
    register({"x": [annotation(rectangle(0, 0, 20, 20), 0), annotation(rectangle(30, 0, 40, 20), 1)]})
    found = instances([rectangle(0, 0, 20, 20)] * 2, [0.9, 0.8], [0, 2])
    results = evaluate({"x": found})
    per_class = [results["sds"][f"mAPr@50-{name}"] for name in CLASSES]
    assert per_class == pytest.approx([100.0, 0.0, 0.0, 0.0])
    assert results["sds"]["mAPr@50"] == results["bbox"]["AP50_11point"] == pytest.approx(25.0)


def test_an_iou_equal_to_the_threshold_matches_masks_and_not_boxes():
    register({"x": [annotation(rectangle(0, 0, 20, 10), 0)]}, classes=["a"])
    results = evaluate({"x": instances([rectangle(0, 0, 10, 10)], [0.9], [0])})  # IoU 0.5
    assert results["sds"]["mAPr@50"] == pytest.approx(100.0)
    assert results["bbox"]["AP50"] == 0.0


def test_difficult_instances_count_for_masks_and_not_for_boxes():
    difficult = annotation(rectangle(30, 0, 50, 20), 0, difficult=1)
    register({"x": [annotation(rectangle(0, 0, 20, 20), 0), difficult]}, classes=["a"])
    found = instances([rectangle(0, 0, 20, 20)], [0.9], [0])
    results = evaluate({"x": found})
    assert results["sds"]["mAPr_area@50"] == pytest.approx(50.0)
    assert results["bbox"]["AP50"] == pytest.approx(100.0)
    # A better prediction of the difficult one: another true positive, and nothing at all.
    both = instances([rectangle(0, 0, 20, 20), rectangle(30, 0, 50, 20)], [0.8, 0.9], [0, 0])
    results = evaluate({"x": both})
    assert results["sds"]["mAPr_area@50"] == results["bbox"]["AP50"] == pytest.approx(100.0)


def test_crowd_regions_are_no_instances_and_forgive_false_positives():
    crowd = annotation(rectangle(30, 0, 60, 40), 0, iscrowd=1)
    register({"x": [annotation(rectangle(0, 0, 20, 20), 0), crowd]}, classes=["a"])
    masks = [rectangle(0, 0, 20, 20), rectangle(35, 5, 45, 15), rectangle(24, 20, 34, 40)]
    in_crowd = evaluate({"x": instances(masks[:2], [0.5, 0.9], [0, 0])})
    assert in_crowd["sds"]["mAPr@50"] == in_crowd["bbox"]["AP50"] == pytest.approx(100.0)
    outside = evaluate({"x": instances(masks, [0.5, 0.9, 0.8], [0, 0, 0])})  # the last one lies in it to 4 / 10
    assert outside["sds"]["mAPr@50"] == outside["bbox"]["AP50"] == pytest.approx(50.0)


def test_results_can_be_verified(small_config, golden, golden_dataset):
    results = evaluate(golden[1])
    cfg = small_config(**{"TEST.EXPECTED_RESULTS": [["sds", "mAPr@50", 45.236, 0.001], ["bbox", "AP50", 46.85, 0.01]]})
    assert verify_results(cfg, results)


# ---- boxes as Detectron2 evaluates VOC

XML = "<annotation><size><width>{w}</width><height>{h}</height></size>{objects}</annotation>"
OBJECT = (
    "<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult><bndbox>"
    "<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
)


@pytest.fixture
def voc(tmp_path):
    """Thirty images in VOC's folders and in COCO format, and predictions around the instances, all drawn at random."""
    generator = np.random.default_rng(0)
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    images, annotations, predictions = [], [], {}
    scores = iter(generator.permutation(999) / 1000)  # the files of Detectron2's evaluator have three digits
    for image in range(30):
        name = f"{image:06d}"
        start = generator.integers(1, 200, size=(4, 2))
        boxes = np.concatenate((start, start + generator.integers(10, 100, size=(4, 2))), axis=1)  # from 1, inclusive
        classes, difficult = generator.integers(0, 3, size=4), generator.random(4) < 0.3
        objects = zip(classes, difficult, boxes)
        objects = [OBJECT.format(name=CLASSES[c], difficult=int(d), box=box) for c, d, box in objects]
        (tmp_path / "Annotations" / f"{name}.xml").write_text(XML.format(w=300, h=300, objects="".join(objects)))
        images.append({"id": name, "file_name": f"{name}.jpg", "height": 300, "width": 300})
        for c, d, (x0, y0, x1, y1) in zip(classes.tolist(), difficult.tolist(), boxes.tolist()):
            box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": name, "category_id": c + 1, "bbox": box, "difficult": int(d)}
            )
        noise = generator.choice([0, 0.5, 1, 3, 9.5], size=(12, 1)) * generator.integers(-1, 2, size=(12, 4))
        found = Instances((300, 300))
        found.pred_boxes = Boxes(torch.tensor(np.tile(boxes - [1, 1, 0, 0], (3, 1)) + noise, dtype=torch.float32))
        found.scores = torch.tensor([next(scores) for _ in range(12)])
        found.pred_classes = torch.tensor(np.where(generator.random(12) < 0.8, np.tile(classes, 3), 0))
        predictions[name] = found
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("\n".join(predictions))
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES[:3], start=1)]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    MetadataCatalog.get("voc_json").set(json_file=str(path))
    return tmp_path, predictions


@pytest.mark.parametrize(("year", "suffix"), [(2007, "_11point"), (2012, "")])
def test_box_ap_is_that_of_detectron2s_pascal_evaluator(voc, year, suffix):
    folder, predictions = voc
    MetadataCatalog.get("voc_xml").set(dirname=str(folder), split="test", year=year, thing_classes=CLASSES[:3])
    reference = PascalVOCDetectionEvaluator("voc_xml")
    reference.reset()
    for name, found in predictions.items():
        reference.process([{"image_id": name}], [{"instances": found}])
    expected = reference.evaluate()["bbox"]
    results = evaluate(predictions, "voc_json", tasks=("bbox",))
    assert set(results) == {"bbox"}
    actual = {key: results["bbox"][key + suffix] for key in ("AP", "AP50", "AP75")}
    assert actual == pytest.approx(expected, abs=1e-9)
    assert 10 < actual["AP75"] < actual["AP50"] < 95


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


# ---- what is evaluated


def test_boxes_alone_where_predictions_have_no_masks():
    register({"x": [annotation(rectangle(0, 0, 20, 20), 0)], "y": []})
    found = instances([rectangle(0, 0, 20, 20)], [0.9], [0])
    found.remove("pred_masks")
    assert set(evaluate({"x": found, "y": nothing(masks=False)})) == {"bbox"}
    # An image without predictions says nothing about masks.
    found = instances([rectangle(0, 0, 20, 20)], [0.9], [0])
    assert set(evaluate({"x": found, "y": nothing(masks=False)})) == {"sds", "bbox"}
    assert set(evaluate({"x": found}, tasks=("sds",))) == {"sds"}


@pytest.mark.parametrize("predictions", [{}, {"x": nothing(), "y": nothing()}], ids=["no images", "no instances"])
def test_no_predictions_are_0_with_a_warning(predictions, caplog):
    register({"x": [annotation(rectangle(0, 0, 20, 20), 0)], "y": []})
    with caplog.at_level(logging.WARNING):
        results = evaluate(predictions)
    assert set(results) == {"sds", "bbox"}
    assert all(value == 0 for scores in results.values() for value in scores.values())
    assert "There are no predictions on 'images'" in caplog.text


def test_images_that_were_not_evaluated_are_counted_and_named(caplog):
    register({i: [annotation(rectangle(0, 0, 20, 20), 0)] for i in range(8)}, classes=["a"])
    found = instances([rectangle(0, 0, 20, 20)], [0.9], [0])
    with caplog.at_level(logging.WARNING):
        results = evaluate({0: found, 3: found})
    assert "6 of the 8 images of 'images' were not evaluated" in caplog.text
    assert "1, 2, 4, 5, 6, ... (6 in all)" in caplog.text
    assert results["sds"]["mAPr_area@50"] == pytest.approx(25.0)


def test_results_are_logged_by_class(caplog):
    register({"x": [annotation(rectangle(0, 0, 20, 20), 1)]})
    with caplog.at_level(logging.INFO):
        evaluate({"x": instances([rectangle(0, 0, 20, 20)], [0.9], [1])})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in caplog.text.splitlines() if "|" in line]
    assert ["class", "mAPr@50", "mAPr@70", "mAPr_area@50", "mAPr_area@70"] in rows
    assert ["b", "100.00", "100.00", "100.00", "100.00"] in rows


def test_datasets_that_do_not_tell_difficult_instances_are_refused(clean_catalogs):
    with pytest.raises(ValueError, match="voc_2007_test.*difficult.*voc_2007_boxes_test"):
        SDSEvaluator("voc_2007_test")


def test_reset_forgets_the_predictions():
    register({"x": [annotation(rectangle(0, 0, 20, 20), 0)]}, classes=["a"])
    evaluator = SDSEvaluator("images")
    for mask, expected in ((rectangle(0, 0, 20, 20), 100.0), (rectangle(30, 0, 50, 20), 0.0)):
        evaluator.reset()
        evaluator.process([{"image_id": "x"}], [{"instances": instances([mask], [0.9], [0])}])
        assert evaluator.evaluate()["sds"]["mAPr@50"] == pytest.approx(expected)


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
