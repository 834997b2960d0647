"""Which evaluators a dataset gets, and what an evaluation by the trainer returns."""

import pytest
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

from mnc_d2.data import register_coco_dataset
from mnc_d2.engine import MNCTrainer
from mnc_d2.evaluation import (
    BoxLevelEvaluator,
    FasterCOCOEvaluator,
    PredictionPictures,
    SDSEvaluator,
    build_evaluator,
    evaluation_protocol,
)

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def dataset(coco_dataset):
    register_coco_dataset("drawn", *coco_dataset)
    return MetadataCatalog.get("drawn")


def retype(metadata, evaluator_type):
    """Give a dataset another evaluator_type, which Detectron2 forbids to change."""
    vars(metadata)["evaluator_type"] = evaluator_type


def evaluators(cfg, folder):
    return build_evaluator(cfg, "drawn", str(folder))._evaluators


@pytest.mark.parametrize(
    ("key", "dataset_type", "protocol"),
    [
        ("auto", "coco", "coco"),
        ("auto", "sds", "sds"),
        ("auto", "pascal_voc", "pascal_voc"),
        ("auto", "lvis", "coco"),
        ("sds", "coco", "sds"),
        ("coco", "sds", "coco"),
    ],
)
def test_protocol_is_that_of_the_key_or_of_the_dataset(dataset, small_config, key, dataset_type, protocol):
    retype(dataset, dataset_type)
    assert evaluation_protocol(small_config(**{"TEST.EVALUATORS": [key]}), "drawn") == protocol


def test_protocol_that_does_not_exist_is_named(dataset, small_config):
    with pytest.raises(ValueError, match="TEST.EVALUATORS has 'voc'. There are: auto, coco, sds"):
        evaluation_protocol(small_config(**{"TEST.EVALUATORS": ["voc"]}), "drawn")


def test_two_protocols_are_an_error(dataset, small_config):
    with pytest.raises(ValueError, match="TEST.EVALUATORS has coco and sds. Their metrics have the same names"):
        evaluation_protocol(small_config(**{"TEST.EVALUATORS": ["coco", "sds"]}), "drawn")


def test_evaluator_that_is_not_registered_is_named(dataset, small_config, tmp_path):
    cfg = small_config(**{"TEST.EVALUATORS": ["auto", "Count"]})
    with pytest.raises(ValueError, match="TEST.EVALUATORS has 'Count'. There are: "):
        evaluators(cfg, tmp_path)


@pytest.mark.parametrize(("protocol", "kind"), [("coco", FasterCOCOEvaluator), ("sds", SDSEvaluator)])
def test_evaluators_of_a_protocol(dataset, small_config, tmp_path, protocol, kind):
    cfg = small_config(**{"TEST.EVALUATORS": [protocol], "TEST.NUM_PICTURES": 0})
    (only,) = evaluators(cfg, tmp_path)
    assert type(only) is kind and isinstance(only, (COCOEvaluator, SDSEvaluator))
    cfg.MODEL.MNC.OUTPUTS, cfg.TEST.NUM_PICTURES = ["instances", "box_instances"], 1
    first, boxes, pictures = evaluators(cfg, tmp_path)
    assert (type(first), type(boxes), type(pictures)) == (kind, BoxLevelEvaluator, PredictionPictures)
    assert type(boxes.evaluator) is kind and boxes.evaluator._tasks == ("bbox",)


def test_voc_xml_is_evaluated_by_detectron2(small_config, tmp_path):
    MetadataCatalog.get("drawn").set(
        evaluator_type="pascal_voc", dirname=str(tmp_path), split="test", year=2007, thing_classes=["a"]
    )
    (tmp_path / "Annotations").mkdir()
    (only,) = evaluators(small_config(**{"TEST.NUM_PICTURES": 0}), tmp_path)
    assert type(only) is PascalVOCDetectionEvaluator


def test_masks_are_left_out_where_ground_truth_lacks_some(dataset, small_config, tmp_path):
    vars(dataset)["has_all_masks"] = False
    for protocol in ("coco", "sds"):
        (only,) = evaluators(small_config(**{"TEST.EVALUATORS": [protocol], "TEST.NUM_PICTURES": 0}), tmp_path)
        assert only._tasks == ("bbox",)


def test_a_dataset_of_type_sds_is_evaluated_with_mapr_and_voc_boxes(dataset, small_config, tmp_path):
    retype(dataset, "sds")
    cfg = small_config(
        **{
            "DATALOADER.NUM_WORKERS": 0,
            "DATASETS.TEST": ("drawn",),
            "MODEL.MNC.OUTPUTS": ["instances", "box_instances"],
            "OUTPUT_DIR": str(tmp_path),
            "TEST.NUM_PICTURES": 0,
        }
    )
    results = MNCTrainer.test(cfg, MNCTrainer.build_model(cfg))
    assert list(results) == ["sds", "bbox", "box_level_bbox"]
    assert {"mAPr@50", "mAPr@70", "mAPr_vol", "mAPr@50-disc", "mAPr@70-square"} < set(results["sds"])
    assert set(results["bbox"]) == set(results["box_level_bbox"]) > {"AP", "AP50", "AP75", "AP50-disc"}
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    folder = "inference/drawn"
    assert written == [f"{folder}/{x}coco_instances_results.json" for x in ("box_level/", "")]
