"""The comparison of variants: folds, statistics, and that it goes on where it was stopped."""

import json
import sys
from pathlib import Path

import pytest
from programs import load_script
from scipy import stats

SCRIPT = Path(__file__).parent / "benchmarks" / "compare.py"


@pytest.fixture(scope="module")
def compare():
    return load_script(SCRIPT)


def write_dataset(folder, name, count, **keys):
    """Annotations of images with one instance each; keys are of the image records, by position."""
    images = [{"id": i, "file_name": f"{name}_{i}.png", "width": 8, "height": 8} for i in range(count)]
    for key, values in keys.items():
        for image, value in zip(images, values):
            image[key] = value
    annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, i + 1, 4]} for i in range(count)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return name, str(path), str(folder)


def read(dataset):
    return json.loads(Path(dataset[1]).read_text())


def test_every_image_is_in_the_test_set_of_one_fold(compare, tmp_path):
    datasets = [write_dataset(tmp_path, "a", 7), write_dataset(tmp_path, "b", 4)]
    folds = compare.write_folds(datasets, 3, None, tmp_path / "folds")
    names = [{Path(x["file_name"]).name for x in read(test)["images"]} for _, test in folds]
    assert sum(map(len, names)) == 11
    assert set.union(*names) == {f"a_{i}.png" for i in range(7)} | {f"b_{i}.png" for i in range(4)}
    for train, test in folds:
        images, held_out = ({x["file_name"] for x in read(x)["images"]} for x in (train, test))
        assert len(images) + len(held_out) == 11 and not images & held_out
        content = read(train)
        ids = {x["id"]: x["file_name"] for x in content["images"]}
        # Annotations follow their images.
        assert all(ids[x["image_id"]].endswith(f"_{x['bbox'][2] - 1}.png") for x in content["annotations"])
        assert len({x["id"] for x in content["annotations"]}) == len(images)


def test_every_fold_has_its_share_of_each_stratum(compare, tmp_path):
    dataset = write_dataset(tmp_path, "a", 12, kind=["x"] * 9 + ["y"] * 3)
    for _, test in compare.write_folds([dataset], 3, "kind", tmp_path / "folds"):
        assert sorted(x["kind"] for x in read(test)["images"]) == ["x", "x", "x", "y"]


def test_folds_are_the_same_every_time(compare, tmp_path):
    dataset = write_dataset(tmp_path, "a", 9)
    first, again = (
        [read(test) for _, test in compare.write_folds([dataset], 3, None, tmp_path / name)] for name in ("1", "2")
    )
    assert first == again


def test_what_folds_cannot_be_made_of_is_an_error_that_names_it(compare, tmp_path):
    dataset = write_dataset(tmp_path, "a", 4)
    with pytest.raises(ValueError, match="image 0 has no 'kind'"):
        compare.write_folds([dataset], 2, "kind", tmp_path)
    other = write_dataset(tmp_path, "b", 4)
    content = {**read(other), "categories": [{"id": 1, "name": "other"}]}
    Path(other[1]).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="b.json: its categories are not those of"):
        compare.write_folds([dataset, other], 2, None, tmp_path)


def test_holms_correction(compare):
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare.holm([0.9, 0.8]) == [1.0, 1.0]
    assert compare.holm([]) == []


def test_differences_are_paired_by_fold_and_seed(compare):
    def metrics(ap):
        return {**dict.fromkeys(compare.METRICS, ap), "train_seconds": 10.0, "seconds_per_image": 0.5}

    keys = [(1, 1), (2, 1), (1, 2)]
    base, shifts = [40.0, 50.0, 45.0], [1.0, 2.0, 3.0]
    results = {
        "base": {key: metrics(x) for key, x in zip(keys, base)},
        # One run more than the other has, which makes no pair.
        "better": {**{key: metrics(x + s) for key, x, s in zip(keys, base, shifts)}, (2, 2): metrics(90.0)},
    }
    row = compare.table(results).splitlines()[-1]
    half = stats.t.ppf(0.975, 2) * 1 / 3**0.5
    assert f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}]" in row
    assert "| 4 " in row and f"{stats.ttest_1samp(shifts, 0).pvalue:.2g}" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "unknown"], "--variant unknown: known are mask_rcnn, mnc"),
        (["--variant", "mnc", "--variant", "mnc"], "Two variants have the same name"),
        (["--train", "a", "--test", "b"], r"Unknown: \['b'\]"),
        (["--iterations", "2"], "--iterations 2: at least 3"),
        ([], "Name datasets of --dataset with --train and --test, or give --folds"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(compare, tmp_path, arguments, message):
    options = compare.argument_parser().parse_args(["--dataset", *write_dataset(tmp_path, "a", 3), *arguments])
    with pytest.raises(ValueError, match=message):
        compare.plan_runs(options)


def test_it_trains_each_variant_and_goes_on_where_it_was_stopped(compare, coco_dataset, tmp_path, monkeypatch, capsys):
    annotations, images = map(str, coco_dataset)
    small = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"]

    def run(*seeds):
        command = ["compare.py", "--dataset", "drawn", annotations, images, "--train", "drawn"]
        command += ["--test", "drawn", "--seeds", *seeds, "--iterations", "3", "--jobs", "1", "--output", str(tmp_path)]
        command += ["--mnc-config", "quickstart/mnc_R_18_FPN.yaml"]
        command += ["--mask-rcnn-config", "quickstart/mask_rcnn_R_18_FPN.yaml"]
        command += ["--variant", "mask_rcnn", "--variant", "narrow", "MODEL.MNC.MASK_FC_DIM", "16", "--opts", *small]
        monkeypatch.setattr(sys, "argv", command)
        compare.main()
        return capsys.readouterr().out.splitlines()

    output = run("1")
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(x["variant"], x["fold"], x["seed"]) for x in records] == [("mask_rcnn", 0, 1), ("narrow", 0, 1)]
    assert all(x["metrics"]["train_seconds"] > 0 and x["metrics"]["seconds_per_image"] > 0 for x in records)
    assert "MASK_FC_DIM: 16" in (tmp_path / "narrow" / "fold_0_seed_1" / "config.yaml").read_text()
    assert not list((tmp_path / "narrow").glob("*/*.pth"))
    # The table is the same, and nothing is trained again.
    assert run("1") == output[len(records) :]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    # Results of before a config was changed are not taken for those of the config.
    monkeypatch.setattr(compare, "digest", lambda config: "another")
    with pytest.raises(ValueError, match=r"results.jsonl has runs of mask_rcnn with other settings"):
        run("1")


def test_a_digest_changes_with_what_a_config_sets(compare, tmp_path):
    first, second, third = (tmp_path / f"{i}.yaml" for i in range(3))
    first.write_text("SOLVER:\n  BASE_LR: 0.5\n")
    second.write_text("# Said in another way.\nSOLVER: {BASE_LR: 0.5}\nSEED: -1\n")  # the default
    third.write_text("SOLVER:\n  BASE_LR: 0.6\n")
    assert compare.digest(str(first)) == compare.digest(str(second)) != compare.digest(str(third))
