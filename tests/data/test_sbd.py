"""SBD: from a folder in its form to training instances, and what each bad file is told."""

import json
import re
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from data.voc_tree import SCENES, TRAIN, VAL, VOID, Scene, write_mat, write_sbd, write_scene, write_voc2012
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import build_detection_train_loader
from PIL import Image
from scipy.io import loadmat, savemat

from mnc_d2.data import VOC_SETS, MNCDatasetMapper, prepare_dataset, register_voc_set
from mnc_d2.data.prepare import common, sbd
from mnc_d2.data.prepare.sbd import main, prepare_sbd, read_sbd_classes, read_sbd_instances

NAMES = ("voc_2012_sds_train", "voc_2012_sds_val")


@pytest.fixture
def root(tmp_path):
    write_voc2012(tmp_path)
    write_sbd(tmp_path)
    return tmp_path


@pytest.fixture
def official(monkeypatch):
    """Make the small folder's numbers of images the official ones."""
    monkeypatch.setattr(sbd, "SBD_LISTS", {"train": 2, "val": 2})
    monkeypatch.setattr(sbd, "VOC_LISTS", {"train": 3, "val": 2})


def json_file(root, name=NAMES[0]):
    return root / "VOC2012" / "mnc_annotations" / f"{name}.json"


def decoded(dataset, name):
    image_id = int(name.replace("_", ""))
    return [x for x in dataset["annotations"] if x["image_id"] == image_id]


def mat(root, kind, name):
    return root / "SBD" / "dataset" / kind / f"{name}.mat"


def test_annotations_equal_the_source(root, official):
    prepare_sbd(root)
    train, val = (json.loads(json_file(root, name).read_text()) for name in NAMES)
    assert [x["id"] for x in train["images"]] == [2008000001, 2008000002]
    assert [x["id"] for x in val["images"]] == [2009000004, 2009000005]
    for dataset, names in ((train, TRAIN[:2]), (val, VAL)):
        assert [x["id"] for x in dataset["annotations"]] == list(range(1, len(dataset["annotations"]) + 1))
        for image, name in zip(dataset["images"], names):
            scene = SCENES[name]
            assert (image["height"], image["width"]) == scene.size
            assert image["file_name"] == f"VOC2012/JPEGImages/{name}.jpg"
            annotations = decoded(dataset, name)
            assert [x["category_id"] for x in annotations] == scene.categories
            assert [(x["difficult"], x["truncated"]) for x in annotations] == [x[5:] for x in scene.objects]
            for annotation, mask in zip(annotations, scene.masks()):
                np.testing.assert_array_equal(mask_util.decode(annotation["segmentation"]), mask)
                y, x = np.nonzero(mask)
                assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
                assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0


def test_registered_dataset_gives_training_instances(root, clean_catalogs, small_config):
    prepare_sbd(root, partial=True)
    register_voc_set("small", VOC_SETS[NAMES[0]], str(root))
    metadata = MetadataCatalog.get("small")
    with pytest.raises(FileNotFoundError, match="small.json"):
        prepare_dataset("small")
    json_file(root).rename(json_file(root, "small"))
    prepare_dataset("small")

    assert metadata.evaluator_type == "sds" and metadata.has_all_masks
    cfg = small_config(**{"DATASETS.TRAIN": ("small",), "DATALOADER.NUM_WORKERS": 0, "SOLVER.IMS_PER_BATCH": 2})
    mapper = MNCDatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True)
    batch = next(iter(build_detection_train_loader(cfg, mapper=mapper)))
    assert len(batch) == 2
    for record in batch:
        assert record["image_id"] in (2008000001, 2008000002)
    for record in DatasetCatalog.get("small"):
        scene = SCENES[Path(record["file_name"]).stem]
        assert [(x["difficult"], x["truncated"]) for x in record["annotations"]] == [x[5:] for x in scene.objects]
        instances = mapper(record)["instances"]
        np.testing.assert_array_equal(instances.gt_masks.tensor.numpy(), scene.masks())
        assert (instances.gt_classes + 1).tolist() == scene.categories
        assert instances.gt_has_mask.all()
        for box, mask in zip(instances.gt_boxes.tensor.tolist(), scene.masks()):
            y, x = np.nonzero(mask)
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def in_cell(value):
    cell = np.empty((1, 1), dtype=object)
    cell[0, 0] = value
    return cell


@pytest.mark.parametrize("wrap", [np.asarray, in_cell])
@pytest.mark.parametrize("categories", [np.uint8(7), [[7.0]], np.array([7], dtype=np.uint8)])
def test_mat_files_are_read_however_they_are_nested(tmp_path, wrap, categories):
    instance_map = np.array([[0, 1], [1, VOID]], dtype=np.uint8)
    struct = {"Segmentation": wrap(instance_map), "Categories": wrap(categories)}
    savemat(tmp_path / "x.mat", {"GTinst": struct, "GTcls": struct})
    found, found_categories = read_sbd_instances(str(tmp_path / "x.mat"))
    np.testing.assert_array_equal(found, instance_map)
    assert found.dtype == np.uint8 and found_categories == [7]
    np.testing.assert_array_equal(read_sbd_classes(str(tmp_path / "x.mat")), instance_map)


def test_layout_of_the_test_files_is_that_of_sbd(root):
    """As loadmat gives the real ones: mat["GTinst"]["Segmentation"][0, 0], categories a column."""
    struct = loadmat(mat(root, "inst", TRAIN[0]))["GTinst"]
    assert struct.shape == (1, 1) and struct["Segmentation"][0, 0].shape == (40, 60)
    assert struct["Categories"][0, 0].shape == (2, 1)


def test_void_and_empty_instances(root, caplog):
    scene = SCENES[TRAIN[0]]
    instance_map = scene.instance_map.copy()
    instance_map[instance_map == 1] = VOID
    write_mat(root / "SBD" / "dataset", TRAIN[0], instance_map, scene.class_map, scene.categories)
    write_mat(root / "SBD" / "dataset", TRAIN[1], np.zeros((50, 30)), np.zeros((50, 30)), [])
    with caplog.at_level("INFO"):
        prepare_sbd(root, [NAMES[0]], partial=True)
    dataset = json.loads(json_file(root).read_text())
    (annotation,) = dataset["annotations"]
    np.testing.assert_array_equal(mask_util.decode(annotation["segmentation"]), instance_map == 2)
    assert len(dataset["images"]) == 2
    assert f"1 instances without a pixel, left out: {TRAIN[0]}/1" in caplog.text
    assert f"1 images without an instance: {TRAIN[1]}" in caplog.text


def test_flags_come_from_the_object_of_largest_overlap(root, caplog):
    """The XML file has the objects in another order, and none near the last instance."""
    boxes = [(2, 3, 30, 33), (5, 5, 34, 35), (40, 2, 58, 20)]
    masks = Scene((40, 60), [("dog", *box, 0, 0) for box in boxes])
    write_mat(root / "SBD" / "dataset", TRAIN[0], masks.instance_map, masks.class_map, masks.categories)
    objects = [("dog", *boxes[1], 0, 1), ("cat", *boxes[2], 1, 1), ("dog", *boxes[0], 1, 0)]
    write_scene(root / "VOC2012", TRAIN[0], Scene((40, 60), objects))
    with caplog.at_level("INFO"):
        prepare_sbd(root, [NAMES[0]], partial=True)
    annotations = decoded(json.loads(json_file(root).read_text()), TRAIN[0])
    assert [(x["difficult"], x["truncated"]) for x in annotations] == [(1, 0), (0, 1), (0, 0)]
    assert f"1 instances without an object in the XML file: their flags are 0: {TRAIN[0]}/3" in caplog.text


def disagree(root):
    scene = SCENES[TRAIN[0]]
    class_map = scene.class_map.copy()
    class_map[scene.instance_map == 2] = 8
    write_mat(root / "SBD" / "dataset", TRAIN[0], scene.instance_map, class_map, scene.categories)
    write_mat(root / "SBD" / "dataset", TRAIN[1], SCENES[TRAIN[1]].instance_map, np.zeros((50, 30)), [15, 9])


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def resize(root):
    Image.new("RGB", (61, 40)).save(root / "VOC2012" / "JPEGImages" / f"{TRAIN[0]}.jpg")


BAD = {
    "inst missing": (lambda root: mat(root, "inst", TRAIN[0]).unlink(), ["missing: .*inst/2008_000001.mat"]),
    "cls missing": (lambda root: mat(root, "cls", TRAIN[0]).unlink(), ["missing: .*cls/2008_000001.mat"]),
    "xml missing": (
        lambda root: (root / "VOC2012" / "Annotations" / f"{TRAIN[0]}.xml").unlink(),
        ["missing: .*Annotations/2008_000001.xml", "--partial"],
    ),
    "image missing": (
        lambda root: (root / "VOC2012" / "JPEGImages" / f"{TRAIN[0]}.jpg").unlink(),
        ["missing: .*JPEGImages/2008_000001.jpg"],
    ),
    "inst truncated": (lambda root: truncate(mat(root, "inst", TRAIN[0])), ["inst/2008_000001.mat cannot be read"]),
    "cls of garbage": (
        lambda root: mat(root, "cls", TRAIN[0]).write_bytes(b"garbage" * 50),
        ["cls/2008_000001.mat cannot be read as a MATLAB file"],
    ),
    "cls empty": (lambda root: mat(root, "cls", TRAIN[0]).write_bytes(b""), ["cls/2008_000001.mat cannot be read"]),
    "another variable": (
        lambda root: savemat(mat(root, "inst", TRAIN[0]), {"x": 1}),
        ["inst/2008_000001.mat has no variable GTinst"],
    ),
    "no struct": (
        lambda root: savemat(mat(root, "inst", TRAIN[0]), {"GTinst": np.eye(3)}),
        ["inst/2008_000001.mat is not a file of SBD"],
    ),
    "class 21": (
        lambda root: write_mat(root / "SBD" / "dataset", TRAIN[0], np.eye(3), np.eye(3), [21]),
        ["inst/2008_000001.mat: GTinst.Categories are not classes from 1 to 20"],
    ),
    "more instances than categories": (
        lambda root: write_mat(root / "SBD" / "dataset", TRAIN[0], np.eye(3) * 2, np.eye(3), [1]),
        ["instance 2 is in the map, but there are 1 categories"],
    ),
    "no map": (
        lambda root: write_mat(root / "SBD" / "dataset", TRAIN[0], np.eye(3) * 0.5, np.eye(3), [1]),
        ["inst/2008_000001.mat: Segmentation is not a map of integers"],
    ),
    "disagreement": (
        disagree,
        [
            "2 problems",
            "instance 2 is dog and cat. --trust-inst",
            "2008_000002.*instance 1 is person and class 0; instance 2 is chair and class 0",
        ],
    ),
    "image truncated": (
        lambda root: truncate(root / "VOC2012" / "JPEGImages" / f"{TRAIN[0]}.jpg"),
        ["JPEGImages/2008_000001.jpg cannot be read"],
    ),
    "other size": (resize, [r"inst/2008_000001.mat is \(60, 40\), but VOC2012/JPEGImages/2008_000001.jpg is \(61, 40"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_and_nothing_is_written(root, official, case):
    spoil, messages = BAD[case]
    spoil(root)
    with pytest.raises(ValueError) as error:
        prepare_sbd(root, [NAMES[0]])
    for message in messages:
        assert re.search(message, str(error.value)), str(error.value)
    report = Path(f"{json_file(root)}.problems.txt")
    assert [path.name for path in json_file(root).parent.iterdir()] == [report.name]
    assert TRAIN[0] in report.read_text()


def test_inst_is_taken_where_asked_for(root, caplog):
    disagree(root)
    with caplog.at_level("INFO"):
        prepare_sbd(root, [NAMES[0]], partial=True, trust_inst=True)
    dataset = json.loads(json_file(root).read_text())
    assert [x["category_id"] for x in dataset["annotations"]] == [12, 12, 15, 9]
    assert "3 instances with pixels of another class in cls/: 2008_000001/2, 2008_000002/1" in caplog.text


def test_partial_leaves_out_what_is_missing(root, caplog):
    mat(root, "inst", TRAIN[0]).unlink()
    (root / "VOC2012" / "Annotations" / f"{TRAIN[1]}.xml").unlink()
    with caplog.at_level("INFO"):
        prepare_sbd(root, partial=True)
    dataset = json.loads(json_file(root).read_text())
    assert [x["id"] for x in dataset["images"]] == [2008000002]
    assert dataset["info"]["images_left_out"] == 1
    assert {(x["difficult"], x["truncated"]) for x in dataset["annotations"]} == {(0, 0)}
    assert "1 images left out, because a file is missing: 2008_000001: missing:" in caplog.text
    assert "1 images without an XML file: 2008_000002" in caplog.text


def test_one_split_is_enough(root, caplog):
    for name in TRAIN[:2]:
        mat(root, "inst", name).unlink()
    with caplog.at_level("INFO"):
        prepare_sbd(root, partial=True)
    assert "voc_2012_sds_train is not prepared: none of the 2 images is there" in caplog.text
    assert not json_file(root).exists() and json_file(root, NAMES[1]).exists()
    with pytest.raises(ValueError, match="none of the 2 images is there"):
        prepare_sbd(root, NAMES[:1], partial=True)


def test_images_of_sbd_stand_in(root, official):
    images = root / "SBD" / "dataset" / "img"
    (root / "VOC2012" / "JPEGImages").rename(images)
    prepare_sbd(root, NAMES[:1])
    dataset = json.loads(json_file(root).read_text())
    assert dataset["images"][0]["file_name"] == "SBD/dataset/img/2008_000001.jpg"


def test_lists_of_other_lengths_are_named(root):
    with pytest.raises(ValueError, match="names 2 images, the official list 8498") as error:
        prepare_sbd(root, NAMES[:1])
    assert "names 3 images, the official list 5717" in str(error.value)


def test_lists_without_a_common_image(root):
    (root / "SBD" / "dataset" / "train.txt").write_text("2011_000001\n")
    (root / "SBD" / "dataset" / "val.txt").write_text(f"{VAL[0]}\n")
    with pytest.raises(ValueError, match="SBD's lists have none of the images of VOC 2012's train.txt"):
        prepare_sbd(root, partial=True)


def test_images_in_neither_list_of_voc_are_said(root, caplog):
    (root / "SBD" / "dataset" / "train.txt").write_text(f"{TRAIN[0]}\n2011_000001\n")
    prepare_sbd(root, partial=True)
    assert "in neither train nor val of VOC 2012, so left out: 2011_000001" in caplog.text


def test_difference_to_the_number_of_the_literature_is_said(root, official, caplog):
    prepare_sbd(root, NAMES[:1])
    assert "voc_2012_sds_train: the lists have their official lengths, but give 2 images, -5621 to" in caplog.text


def test_interrupted_run_leaves_nothing_and_a_finished_one_is_kept(root, monkeypatch, caplog):
    encode, calls = common.encode_masks, []

    def interrupt(*args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(sbd, "encode_masks", interrupt)
    assert main(["--root", str(root), "--partial"]) == 130
    assert [path.name for path in json_file(root).parent.iterdir()] == [f"{NAMES[0]}.json"]
    first = json_file(root).stat()
    with caplog.at_level("INFO"):
        assert main(["--root", str(root), "--partial"]) == 0
    assert len(calls) == 6  # of the first set, nothing was converted again
    assert json_file(root).stat().st_mtime_ns == first.st_mtime_ns and json_file(root, NAMES[1]).exists()
    assert "is there, 2 images. --force writes it again" in caplog.text
    assert main(["--root", str(root), "--partial", "--force", NAMES[0]]) == 0
    assert json_file(root).stat().st_mtime_ns > first.st_mtime_ns


def test_interrupted_writing_leaves_nothing(root, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.os, "replace", interrupt)
    assert main(["--root", str(root), "--partial"]) == 130
    assert list(json_file(root).parent.iterdir()) == []


def test_a_file_of_another_origin_is_not_taken_for_a_finished_one(root, capsys):
    json_file(root).parent.mkdir()
    json_file(root).write_text('{"images": []}')
    assert main(["--root", str(root), "--partial"]) == 1
    assert f"{json_file(root)} was not written by this command" in capsys.readouterr().err
    assert main(["--root", str(root), "--partial", "--force"]) == 0


def test_mistakes_end_the_command_with_a_sentence(root, capsys):
    assert main(["--root", str(root)]) == 1
    assert "names 2 images, the official list 8498" in capsys.readouterr().err
    assert main(["--root", str(root), "voc_2012_sds_test"]) == 1
    assert "voc_2012_sds_test is not among voc_2012_sds_train, voc_2012_sds_val" in capsys.readouterr().err
