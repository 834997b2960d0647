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
from detectron2.data import MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator, verify_results
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from evaluation.sds_inputs import CLASSES, annotation, evaluate, instances, nothing, rectangle, register, rle

from mnc_d2.engine import leave_process_group
from mnc_d2.evaluation import BoxLevelEvaluator, SDSEvaluator
from mnc_d2.evaluation.average_precision import best_overlaps, match

pytestmark = pytest.mark.usefixtures("clean_catalogs")
GOLDEN = np.load(Path(__file__).with_name("golden_sds.npz"))


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


def run_process(rank, predictions, folder):
    """One of two processes: an image each. Forked, it knows the dataset."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    comm.create_local_process_group(2)
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
    _, predictions = tied
    backwards = dict(reversed(predictions.items()))
    mp.start_processes(run_process, (backwards, tmp_path), nprocs=2, start_method="fork")
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
