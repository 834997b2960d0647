"""train_net.py end to end, on two drawn images: it overfits, evaluates, resumes, and refuses bad input."""

import json
import math
import shutil
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from programs import CONFIG, OVERRIDES, ROOT, arguments_for, parse, read_metrics, run_here, train_net
from small_backbone import build_small_fpn_backbone

from mnc_d2.data import VOC_SETS, coco_checks, register_voc_set
from mnc_d2.data.images import read_image_size
from mnc_d2.evaluation import summarize

ITERATIONS = 120


def run_small(dataset, output, *arguments, overrides=(), **kwargs):
    """Run train_net.py with the small backbone; return what it printed."""
    overrides = ["MODEL.BACKBONE.NAME", build_small_fpn_backbone.__name__, *overrides]
    return run_here(arguments_for(dataset, output, *arguments, overrides=overrides, **kwargs))


@pytest.fixture(scope="module")
def trained(coco_dataset, tmp_path_factory):
    """The folder and the output of a whole training."""
    output = tmp_path_factory.mktemp("trained")
    return output, run_small(coco_dataset, output, iterations=ITERATIONS)


def last_ap(output):
    """The last AP that was evaluated, by task."""
    (*_, scores) = [line for line in read_metrics(output) if "segm/AP" in line]
    return {task: scores[f"{task}/AP"] for task in ("bbox", "segm")}


def test_two_images_are_overfitted(trained):
    output, _ = trained
    assert last_ap(output)["segm"] > 80
    assert last_ap(output)["bbox"] > 80


def test_the_loss_of_every_stage_falls(trained):
    output, _ = trained
    stages = {
        "1": ["loss_rpn_cls", "loss_rpn_loc", "loss_rpn_roi_cls", "loss_rpn_roi_loc"],
        "2": ["loss_mask_s2"],
        "3": ["loss_cls_s3", "loss_seg_cls_s3", "loss_box_reg_s3"],
        "4": ["loss_mask_s4"],
        "5": ["loss_cls_s5", "loss_seg_cls_s5", "loss_box_reg_s5"],
    }
    logged = [line for line in read_metrics(output) if "total_loss" in line]
    for stage, names in stages.items():
        first, last = (sum(logged[i][name] for name in names) for i in (0, -1))
        # The mask losses, which start low, fall to a quarter; a loss that gets no gradient stays as it is.
        assert last < 0.5 * first, stage


def test_the_output_ends_with_the_table_and_the_places_of_the_results(trained):
    output, stdout = trained
    table = stdout[stdout.rindex("dataset") :].splitlines()
    scores = {cells[1]: cells for cells in (line.split() for line in table) if cells[:1] == ["drawn"]}
    for task, ap in last_ap(output).items():
        assert float(scores[task][2]) == pytest.approx(ap, abs=0.051)  # one digit after the point
    places = {line.split(":")[0]: Path(line.split()[1]) for line in table if line.split(":")[0] in PLACES}
    assert places == {name: output / place for name, place in PLACES.items()}
    assert all(place.exists() for place in places.values())


PLACES = {"pictures": Path("inference/drawn/pictures"), "log": Path("log.txt"), "checkpoint": Path("model_final.pth")}


def test_pictures_are_written(trained):
    output, _ = trained
    (path,) = (output / PLACES["pictures"]).iterdir()
    with Image.open(path) as picture:
        assert picture.size == (2 * 640, 640)  # two panels, enlarged


def test_scalars_and_images_are_written_for_tensorboard(trained):
    output, _ = trained
    assert any(path.name.startswith("events.out.tfevents") for path in output.iterdir())


def test_eval_only_gives_the_ap_of_the_end_of_training(trained, coco_dataset, tmp_path):
    output, _ = trained
    weights = output / "model_final.pth"
    overrides = [
        *("MODEL.WEIGHTS", weights, "TEST.NUM_PICTURES", 0),
        *("MODEL.MNC.OUTPUTS", "['instances', 'box_instances']"),
    ]
    stdout = run_small(coco_dataset, tmp_path, "--eval-only", overrides=overrides)
    rows = [line.split() for line in stdout[stdout.rindex("dataset") :].splitlines()]
    printed = {cells[1]: float(cells[2]) for cells in rows if cells[:1] == ["drawn"]}
    for task, ap in last_ap(output).items():
        assert printed[task] == pytest.approx(ap, abs=0.051)
    assert printed["box_level_bbox"] > 80  # MNC_box beside
    assert stdout.count(f"checkpoint: {weights}") == 1
    assert not (tmp_path / PLACES["pictures"]).exists()


def test_eval_only_prints_mapr_and_box_ap(trained, coco_dataset, tmp_path):
    output, _ = trained
    overrides = [
        *("MODEL.WEIGHTS", output / "model_final.pth", "TEST.NUM_PICTURES", 0, "TEST.EVALUATORS", "['sds']"),
        *("MODEL.MNC.OUTPUTS", "['instances', 'box_instances']"),
    ]
    stdout = run_small(coco_dataset, tmp_path, "--eval-only", overrides=overrides)
    header, _, *lines = [line.split() for line in stdout[stdout.rindex("dataset") :].splitlines()]
    assert header == ["dataset", "task", "AP", "AP50", "AP75", "mAPr@50", "mAPr@70", "mAPr_vol"]
    rows = {cells[1]: [float(x) for x in cells[2:]] for cells in lines if cells[:1] == ["drawn"]}
    assert {task: len(row) for task, row in rows.items()} == {"sds": 3, "bbox": 3, "box_level_bbox": 3}
    assert rows["sds"][0] > 80 and rows["sds"][1] > 80  # at 0.5 and at 0.7
    assert rows["bbox"][1] > 80 and rows["box_level_bbox"][1] > 80


def test_resume_continues_at_the_iteration_after_the_last(trained, coco_dataset, tmp_path):
    trained_output, _ = trained
    output = tmp_path / "resumed"
    shutil.copytree(trained_output, output)
    # An iteration is a step of the optimizer, of however many batches.
    overrides = ["SOLVER.ACCUMULATE", 2]
    run_small(coco_dataset, output, "--resume", iterations=ITERATIONS + 2, overrides=overrides)
    assert f"Starting training from iteration {ITERATIONS}" in (output / "log.txt").read_text()
    before, after = ((x / "metrics.json").read_text() for x in (trained_output, output))
    assert after.startswith(before)
    new = [json.loads(line) for line in after[len(before) :].splitlines()]
    # Losses are written at the last iteration, counted from 0.
    assert [line["iteration"] for line in new if "total_loss" in line] == [ITERATIONS + 1]
    # It has not started anew: two iterations at the learning rate of the end leave the model as good as it was.
    assert last_ap(output)["segm"] > 80


# ---- bad input: one sentence, before anything is trained


@pytest.fixture
def configure(clean_catalogs):
    """A function that returns the config of a command line."""
    return lambda *arguments: train_net.build_config(parse(arguments))


DRAWN = ["DATASETS.TRAIN", "('drawn',)", "DATASETS.TEST", "('drawn',)"]


def test_number_of_classes_is_read_from_the_dataset(configure, coco_dataset):
    cfg = configure("--config-file", CONFIG, "--dataset", "drawn", *coco_dataset, *DRAWN)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert MetadataCatalog.get("drawn").thing_classes == ["disc", "square"]


def test_number_of_classes_that_differs_from_the_dataset_names_both_and_the_file(configure, coco_dataset):
    overrides = [*DRAWN, "MODEL.ROI_HEADS.NUM_CLASSES", "7"]
    with pytest.raises(ValueError) as error:
        configure("--config-file", CONFIG, "--dataset", "drawn", *coco_dataset, *overrides)
    assert " 7" in str(error.value) and " 2 " in str(error.value) and str(coco_dataset[0]) in str(error.value)


def test_several_datasets_are_registered(configure, coco_dataset):
    more = ["--dataset", "again", *coco_dataset]
    cfg = configure(
        *("--config-file", CONFIG, "--dataset", "drawn", *coco_dataset, *more),
        *("DATASETS.TRAIN", "('drawn','again')", "DATASETS.TEST", "('again',)"),
    )
    assert cfg.DATASETS.TRAIN == ("drawn", "again")
    assert len(DatasetCatalog.get("drawn")) == len(DatasetCatalog.get("again")) == 2


def test_only_the_process_that_looks_for_mistakes_reads_image_headers(
    coco_dataset, clean_catalogs, monkeypatch, tmp_path
):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))  # one in which nothing is known of them
    read = []
    monkeypatch.setattr(coco_checks, "read_image_size", lambda path: read.append(path) or read_image_size(path))
    arguments = ["--config-file", CONFIG, "--dataset", "drawn", *coco_dataset, *DRAWN, "OUTPUT_DIR", tmp_path]
    args = parse(arguments)
    train_net.build_config(args, check_files=False)  # as a process that was started after the check
    assert read == []
    DatasetCatalog.remove("drawn")
    MetadataCatalog.remove("drawn")
    assert train_net.find_input_error(args) is None
    assert len(read) == 2


def test_torchrun_and_num_gpus_exclude_each_other(configure, coco_dataset, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    arguments = ["--config-file", CONFIG, "--dataset", "drawn", *coco_dataset]
    configure(*arguments, *DRAWN)
    with pytest.raises(ValueError, match="torchrun starts the processes already"):
        configure(*arguments, "--num-gpus", 2, *DRAWN)


def test_evaluator_that_does_not_exist_is_named(configure, coco_dataset):
    arguments = ["--config-file", CONFIG, "--dataset", "drawn", *coco_dataset, *DRAWN]
    with pytest.raises(ValueError, match="TEST.EVALUATORS has 'voc'"):
        configure(*arguments, "TEST.EVALUATORS", "['voc']")


def test_images_that_processes_cannot_share_are_named(configure, coco_dataset):
    arguments = ["--config-file", CONFIG, "--dataset", "drawn", *coco_dataset, "--num-gpus", 3, "--num-machines", 2]
    overrides = [*DRAWN, "MODEL.WEIGHTS", __file__, "SOLVER.IMS_PER_BATCH"]
    configure("--eval-only", *arguments, *overrides, 3)
    configure(*arguments, *overrides, 6)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is 3, for 6 processes"):
        configure(*arguments, *overrides, 3)


def test_overrides_win_over_the_file(configure, coco_dataset):
    cfg = configure("--config-file", CONFIG, "--dataset", "drawn", *coco_dataset, *DRAWN, "SOLVER.MAX_ITER", 3)
    assert cfg.SOLVER.MAX_ITER == 3 and cfg.is_frozen()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.MNC.NO_SUCH_KEY", "1"], "MODEL.MNC.NO_SUCH_KEY"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER"),
    ],
    ids=["key that does not exist", "value of another type", "key without a value"],
)
def test_wrong_override_names_the_key(configure, overrides, message):
    with pytest.raises(ValueError, match=message):
        configure("--config-file", CONFIG, *overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL:\n  MNC:\n    NO_SUCH_KEY: 1\n", "MODEL.MNC.NO_SUCH_KEY"),
        ("SOLVER:\n  MAX_ITER: many\n", "SOLVER.MAX_ITER"),
        ("MODEL: [\n", "config.yaml"),
        ("just words\n", "config.yaml"),
    ],
    ids=["key that does not exist", "value of another type", "not YAML", "not a mapping"],
)
def test_wrong_config_file_is_named_with_the_key(configure, tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        configure("--config-file", path)
    assert "config.yaml" in str(error.value)


@pytest.mark.parametrize("where", ["config.yaml", "base.yaml"])
def test_no_code_of_a_config_file_or_its_base_is_run(configure, tmp_path, where):
    mark = tmp_path / "mark"
    (tmp_path / "base.yaml").write_text("VERSION: 2\n")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\n")
    with open(tmp_path / where, "a") as file:
        file.write(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(ValueError, match="python/object/apply:os.mkdir"):
        configure("--config-file", tmp_path / "config.yaml")
    assert not mark.exists()


def test_missing_config_file_is_named(configure, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no config file .*none\.yaml'"):
        configure("--config-file", tmp_path / "none.yaml")


def test_a_config_is_found_by_name(configure, coco_dataset):
    by_name, by_file = (
        configure("--config-file", name, "--dataset", "drawn", *coco_dataset, *DRAWN)
        for name in ("quickstart/mnc_R_18_FPN.yaml", CONFIG)
    )
    assert by_name == by_file


def test_missing_checkpoint_is_named(configure, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS .*none\.pth does not exist"):
        configure("--config-file", CONFIG, "--eval-only", "MODEL.WEIGHTS", tmp_path / "none.pth")


def test_evaluation_of_nothing_is_refused(configure, coco_dataset):
    with pytest.raises(ValueError, match="nothing to evaluate: add MODEL.WEIGHTS"):
        configure("--config-file", CONFIG, "--dataset", "drawn", *coco_dataset, "--eval-only", *OVERRIDES)


def test_missing_base_of_a_config_file_is_named(configure, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("_BASE_: none.yaml\n")
    with pytest.raises(OSError, match=r"none\.yaml"):
        configure("--config-file", path)


def test_missing_annotation_file_is_named(configure, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        configure("--config-file", CONFIG, "--dataset", "drawn", tmp_path / "none.json", tmp_path)


def test_dataset_that_is_not_registered_is_named(configure):
    with pytest.raises(ValueError, match="'nowhere'"):
        configure("--config-file", CONFIG, "DATASETS.TRAIN", "('nowhere',)")


VOC_CONFIG = ROOT / "configs" / "PascalVOC-Detection" / "mnc_VGG_16_5stage_0712.yaml"


def test_dataset_that_is_not_prepared_is_named_if_it_is_used(clean_catalogs, tmp_path):
    register_voc_set("absent", VOC_SETS["voc_2012_sds_train"], str(tmp_path))
    (tmp_path / "VOC2012" / "mnc_annotations").mkdir(parents=True)
    register_voc_set("present", VOC_SETS["voc_2012_sds_val"], str(tmp_path))
    (tmp_path / "VOC2012" / "mnc_annotations" / "present.json").touch()
    arguments = ["--config-file", VOC_CONFIG, "MODEL.WEIGHTS", __file__, "MODEL.DEVICE", "cpu"]
    arguments += ["DATASETS.TRAIN", "('absent',)", "DATASETS.TEST", "('present',)"]
    mistake = train_net.find_input_error(parse(arguments))
    assert str(tmp_path / "VOC2012" / "mnc_annotations" / "absent.json") in mistake
    assert "python datasets/prepare_sbd.py" in mistake
    # An evaluation needs no training data.
    assert train_net.find_input_error(parse(["--eval-only", *arguments])) is None


# ---- the summary


@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids=["one dataset", "two datasets"])
def test_summary_has_a_row_for_each_task_of_each_dataset(small_config, capsys, names):
    cfg = small_config(**{"DATASETS.TEST": names, "OUTPUT_DIR": "somewhere"})
    scores = {"bbox": {"AP": 12.34, "AP50": 50.0, "AP75": math.nan}, "segm": {"AP": 1.0, "AP50": 2.0, "AP75": 3.0}}
    # As Detectron2's trainer returns them: by dataset only if there are several.
    print(summarize(cfg, scores if len(names) == 1 else dict.fromkeys(names, scores), "model.pth"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name in names:
        assert [name, "bbox", "12.3", "50.0", "nan"] in rows
        assert [name, "segm", "1.0", "2.0", "3.0"] in rows
    assert ["checkpoint:", "model.pth"] in rows


def test_summary_has_a_column_for_each_kind_of_metric(small_config, capsys):
    cfg = small_config(**{"DATASETS.TEST": ("a", "b"), "OUTPUT_DIR": "somewhere"})
    boxes = {"AP": 30.0, "AP50": 50.0, "AP75": 40.0, "AP50-cat": 1.0}
    regions = {"mAPr@50": 63.5, "mAPr@70": 41.5, "mAPr_vol": 0.25, "mAPr_area@50": 1.0, "mAPr@50-cat": 2.0}
    print(summarize(cfg, {"a": {"sds": regions, "bbox": boxes}, "b": {"segm": boxes}}, "model.pth"))
    header, _, sds, bbox, segm, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["dataset", "task", "AP", "AP50", "AP75", "mAPr@50", "mAPr@70", "mAPr_vol"]
    assert sds.split() == ["a", "sds", "63.5", "41.5", "0.2"]
    assert bbox.split() == ["a", "bbox", "30.0", "50.0", "40.0"]
    assert segm.split() == ["b", "segm", "30.0", "50.0", "40.0"]
    # Numbers stand below the metric that they are of.
    assert header.index("mAPr@50") <= sds.index("63.5") < header.index("mAPr@70") <= sds.index("41.5")
    assert header.index("AP50") - 1 <= bbox.index("50.0") < header.index("AP75") - 1
