"""The command mnc: its help, training and evaluation end to end, what it says of models and data."""

import io
import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout

import pytest
from PIL import Image
from programs import restored_catalogs, restored_loggers

from mnc_d2.checkpoint import read_description
from mnc_d2.cli import COMMANDS, main
from mnc_d2.cli.train import evaluation_period
from mnc_d2.model_zoo import get_config

# A training of four iterations that tests can afford.
SMALL = {
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.DEVICE": "cpu",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.IMS_PER_BATCH": 1,
    "TEST.EVAL_PERIOD": 2,
    "TEST.NUM_PICTURES": 1,
    "VIS_PERIOD": 0,
}
SETTINGS = [x for key, value in SMALL.items() for x in ("--set", key, str(value))]


@pytest.fixture(scope="module")
def trained(coco_dataset, tmp_path_factory):
    """The folder of a training, and what it wrote to the standard output and the standard error."""
    folder = tmp_path_factory.mktemp("trained")
    annotations = str(coco_dataset[0])
    arguments = ["train", "quickstart/mnc_R_18_FPN.yaml", "--data", annotations, "--val", annotations]
    with restored_catalogs(), restored_loggers():
        with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
            main([*arguments, "--output", str(folder), *SETTINGS])
    return folder, output.getvalue(), errors.getvalue()


def test_a_training_writes_models_that_know_the_data(trained):
    folder, *_ = trained
    for name in ("model_final.pth", "model_best.pth"):
        description = read_description(str(folder / name))
        assert description.class_names == ["disc", "square"]
        assert "segm/AP" in description.metrics


def test_the_terminal_has_results_and_the_file_the_log(trained):
    folder, output, errors = trained
    assert len(output.splitlines()) < 10
    assert "segm" in output and str(folder / "model_final.pth") in output
    log = (folder / "log.txt").read_text()
    assert "Running with full config" in log and "total_loss" in log
    assert "total_loss" not in output + errors


@pytest.mark.parametrize(
    "images, iterations, overrides, period",
    [
        (93, 250, [], 125),  # two evaluations of 93 images are less than half of 500
        (154, 250, [], 250),  # at the end alone
        (5000, 90000, [], 18000),  # five
        (10, 251, [], 51),  # five, and none just before the last
        (154, 250, ["SOLVER.ACCUMULATE", 8], 50),
        (154, 250, ["SOLVER.PATIENCE", 2], 50),
        (0, 3, [], 1),
    ],
)
def test_evaluations_take_less_time_than_the_training(images, iterations, overrides, period):
    cfg = get_config("quickstart/mnc_R_18_FPN.yaml")
    cfg.merge_from_list(["SOLVER.MAX_ITER", iterations, *overrides])
    assert evaluation_period(cfg, images) == period


@pytest.mark.usefixtures("clean_catalogs")
def test_evaluation_needs_the_model_and_the_data_only(trained, coco_dataset, capsys):
    folder, *_ = trained
    main(["eval", str(folder / "model_final.pth"), "--data", str(coco_dataset[0]), "--device", "cpu"])
    (task,) = [line.split() for line in capsys.readouterr().out.splitlines() if " segm " in line]
    expected = read_description(str(folder / "model_final.pth")).metrics["segm/AP"]
    assert float(task[2]) == pytest.approx(expected, abs=0.051)  # one digit after the point
    (dataset,) = (folder / "eval" / "inference").iterdir()
    assert (dataset / "coco_instances_results.json").exists() and len(list((dataset / "pictures").iterdir())) == 1


@pytest.mark.usefixtures("clean_catalogs")
def test_a_report_is_one_page_about_the_run(trained, tmp_path, capsys):
    output = tmp_path / "new" / "folder" / "report.html"
    main(["report", str(trained[0]), "--output", str(output)])
    assert str(output) in capsys.readouterr().out
    page = output.read_text()
    for text in (
        "square",
        "Learning curves",
        "Worst images",
        "pass 2, stages 4 and 5",
        "after mask voting",
        "MAX_ITER: 4",
    ):
        assert text in page, text
    # Nothing is loaded from elsewhere: pictures are in the page.
    assert set(re.findall(r'src="([a-z]+):', page)) == {"data"} and "href" not in page
    assert len(re.findall(r'src="data:image/jpeg', page)) >= 2 * 2 + 2 * 3


@pytest.mark.usefixtures("clean_catalogs")
def test_a_report_needs_a_run_with_predictions(tmp_path, trained):
    with pytest.raises(SystemExit, match="mnc report: .* is not the folder of a run"):
        main(["report", str(tmp_path)])
    for name in ("config.yaml", "model_final.pth"):
        shutil.copy(trained[0] / name, tmp_path)
    with pytest.raises(SystemExit, match="has no predictions. Evaluate the model first"):
        main(["report", str(tmp_path)])


@pytest.mark.usefixtures("clean_catalogs")
def test_data_of_other_classes_is_an_error(model_file, coco_dataset, tmp_path):
    annotations, images = coco_dataset
    dataset = json.loads(annotations.read_text())
    dataset["categories"][0]["name"] = "ball"
    (tmp_path / "other.json").write_text(json.dumps(dataset))
    arguments = ["eval", str(model_file), "--data", str(tmp_path / "other.json"), "--images", str(images)]
    with pytest.raises(SystemExit, match="classes of the data are ball, square; those of the model are disc, square"):
        main(arguments)


def test_info_says_what_a_model_is(model_file, capsys):
    main(["info", str(model_file), "--size", "64", "64"])
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "5 in training, 5 at inference" in lines["stages"]
    assert "2: disc, square" in lines["classes"]
    assert "12.5" in lines["segm/AP"]
    total = int(lines["parameters"].split()[-1].replace(",", ""))
    parts = [int(line.split()[-1].replace(",", "")) for name, line in lines.items() if name in PARTS]
    assert total == sum(parts) > 0 and len(parts) == len(PARTS)
    assert "billion multiply-adds" in lines["FLOPs"]


HEADS = "roi_heads.passes.0"
PARTS = [
    *("backbone", "proposal_generator", f"{HEADS}.mask_head", f"{HEADS}.classifier.mask_path_head"),
    *(f"{HEADS}.classifier.box_path_head", f"{HEADS}.classifier.predictor"),
]


@pytest.mark.usefixtures("clean_catalogs")
def test_data_is_counted_split_and_drawn(coco_dataset, tmp_path, capsys):
    arguments = ["--split", "0.5", "--augmentations", "2", "--output", str(tmp_path)]
    main(["data", str(coco_dataset[0]), *arguments])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["disc", "4"] in rows and ["square", "3"] in rows and ["instances", "7"] in rows
    parts = [json.loads((tmp_path / name).read_text()) for name in ("train.json", "val.json")]
    assert sorted(image["id"] for part in parts for image in part["images"]) == [1, 2]
    for part in parts:
        assert {x["image_id"] for x in part["annotations"]} == {x["id"] for x in part["images"]}
    for name in ("1_augmented.png", "2_augmented.png"):
        assert Image.open(tmp_path / name).width == 640


@pytest.mark.usefixtures("clean_catalogs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "nowhere.json"], "mnc data: The dataset nowhere.json does not exist"),
        (["data", "{annotations}", "--split", "0.5"], "Add --output"),
        (["train", "quickstart/none.yaml", "--data", "{annotations}"], "mnc train: There is no config file"),
        (["train", "quickstart/mnc_R_18_FPN.yaml", "--data", "{tmp}"], "no annotations in COCO format.*mnc data"),
        (["eval", "{annotations}", "--data", "{annotations}"], "annotations.json cannot be loaded"),
        (["info", "nowhere.pth"], "nowhere.pth does not exist"),
    ],
)
def test_wrong_input_ends_in_one_sentence(coco_dataset, tmp_path, arguments, message):
    arguments = [x.format(annotations=coco_dataset[0], tmp=tmp_path) for x in arguments]
    with pytest.raises(SystemExit, match=message):
        main(arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"example:\n  mnc {command} " in capsys.readouterr().out
