"""PASCAL VOC: from a folder in its form to training instances; the registered datasets and their unions."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from data.voc_tree import SCENES, TRAIN, VAL, VOID, Scene, void_border, write_list, write_scene, write_voc2012
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from PIL import Image

from mnc_d2.data import (
    VOC_CLASSES,
    VOC_SETS,
    VOC_UNIONS,
    MNCDatasetMapper,
    num_classes_from_datasets,
    prepare_dataset,
    register_union,
    register_voc_set,
)
from mnc_d2.data.prepare.voc import VOCObject, flag_annotations, main, prepare_voc, read_objects
from mnc_d2.data.voc import voc_palette

SCENES_2007 = {
    "000005": Scene((30, 40), [("chair", 3, 4, 20, 28, 0, 0), ("person", 10, 0, 40, 30, 1, 1)]),
    "000006": Scene((20, 22), [("sofa", 1, 1, 20, 18, 0, 0)]),
    "000007": Scene((25, 25), [("car", 0, 5, 25, 20, 0, 1)]),
}


@pytest.fixture
def root(tmp_path):
    write_voc2012(tmp_path)
    for name, scene in SCENES_2007.items():
        write_scene(tmp_path / "VOC2007", name, scene, masks=False)
    write_list(tmp_path / "VOC2007" / "ImageSets" / "Main" / "trainval.txt", ["000005", "000006"])
    write_list(tmp_path / "VOC2007" / "ImageSets" / "Main" / "test.txt", ["000007"])
    return tmp_path


def read(root, name):
    return json.loads(Path(VOC_SETS[name].json_file(str(root), name)).read_text())


def of_image(dataset, name):
    return [x for x in dataset["annotations"] if x["image_id"] == int(name.replace("_", ""))]


def flags(annotations):
    return [(x["difficult"], x["truncated"]) for x in annotations]


def test_masks_equal_the_source_without_the_border(root):
    prepare_voc(root, ["voc_2012_seg_train", "voc_2012_seg_val"], partial=True)
    for dataset, names in ((read(root, "voc_2012_seg_train"), TRAIN), (read(root, "voc_2012_seg_val"), VAL)):
        assert [x["id"] for x in dataset["images"]] == [int(name.replace("_", "")) for name in names]
        for name in names:
            scene, annotations = SCENES[name], of_image(dataset, name)
            border = void_border(scene.instance_map)
            assert border.any()
            assert [x["category_id"] for x in annotations] == scene.categories
            assert flags(annotations) == [x[5:] for x in scene.objects]
            for annotation, mask in zip(annotations, scene.masks()):
                mask = mask & ~border
                np.testing.assert_array_equal(mask_util.decode(annotation["segmentation"]), mask)
                y, x = np.nonzero(mask)
                assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
                assert annotation["area"] == mask.sum()


def test_boxes_are_those_of_detectron2(root, clean_catalogs):
    prepare_voc(root, ["voc_2007_boxes_trainval"], partial=True)
    dataset = read(root, "voc_2007_boxes_trainval")
    assert dataset["images"][0] == {"id": 5, "file_name": "VOC2007/JPEGImages/000005.jpg", "height": 30, "width": 40}
    annotations = of_image(dataset, "000005")
    assert [x["bbox"] for x in annotations] == [[3, 4, 17, 24], [10, 0, 30, 30]]
    assert [x["area"] for x in annotations] == [17 * 24, 900]
    assert flags(annotations) == [(0, 0), (1, 1)]
    assert not any("segmentation" in x for x in dataset["annotations"])

    register_pascal_voc("of_detectron2", str(root / "VOC2007"), "trainval", 2007)
    for record, scene in zip(DatasetCatalog.get("of_detectron2"), SCENES_2007.values()):
        assert [x["bbox"] for x in record["annotations"]] == [list(x[1:5]) for x in scene.objects]


def test_objects_are_matched_one_to_one_by_class_and_overlap():
    boxes = [(0, 0, 10, 10), (0, 0, 10, 9), (0, 0, 10, 8), (50, 50, 4, 4), (50, 50, 10, 10)]
    annotations = [{"category_id": 3, "bbox": list(box)} for box in boxes]
    objects = [
        VOCObject(3, (0, 0, 10, 9), 1, 0),
        VOCObject(3, (0, 0, 10, 10), 0, 1),
        VOCObject(4, (50, 50, 4, 4), 1, 1),  # of another class
        VOCObject(3, (50, 50, 10, 5), 1, 1),  # IoU with the last box is exactly 0.5
    ]
    assert flag_annotations(annotations, objects) == [2, 3]
    assert flags(annotations) == [(0, 1), (1, 0), (0, 0), (0, 0), (1, 1)]
    assert flag_annotations(annotations, []) == [0, 1, 2, 3, 4]
    assert flags(annotations) == [(0, 0)] * 5
    assert flag_annotations([], objects) == []


def test_instance_k_is_object_k_unless_class_or_box_say_otherwise():
    annotations = [{"category_id": 3, "bbox": list(box)} for box in [(0, 0, 10, 8), (0, 0, 10, 10), (30, 30, 5, 5)]]
    objects = [
        VOCObject(3, (0, 0, 10, 10), 1, 0),
        VOCObject(3, (0, 0, 10, 9), 0, 1),
        VOCObject(8, (30, 30, 5, 5), 1, 1),
    ]
    assert flag_annotations(annotations, objects, expected=[0, 1, 2]) == [2]
    assert flags(annotations) == [(1, 0), (0, 1), (0, 0)]
    # By overlap alone the first two change places; so they do where the expected object has another class.
    assert flag_annotations(annotations, objects) == [2]
    assert flags(annotations) == [(0, 1), (1, 0), (0, 0)]
    assert flag_annotations(annotations, objects, expected=[2, 2, 7]) == [2]
    assert flags(annotations) == [(0, 1), (1, 0), (0, 0)]


def test_missing_flags_are_0_and_boxes_may_be_fractions(tmp_path):
    (tmp_path / "x.xml").write_text(
        "<annotation><size><width>9</width><height>8</height></size><object><name>cow</name><bndbox>"
        "<xmax>7.5</xmax><xmin>1.5</xmin><ymin>2</ymin><ymax>8</ymax></bndbox></object></annotation>"
    )
    assert read_objects(str(tmp_path / "x.xml")) == ((8, 9), [VOCObject(10, (0.5, 1.0, 7.0, 7.0), 0, 0)])


def xml(root):
    return root / "VOC2012" / "Annotations" / f"{TRAIN[0]}.xml"


def png(root, kind):
    return root / "VOC2012" / f"Segmentation{kind}" / f"{TRAIN[0]}.png"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def blank_class(root):
    Image.new("L", (60, 40)).save(png(root, "Class"))


BAD = {
    "unknown class": ("boxes", lambda r: replace(xml(r), ">dog<", ">wolf<"), ["000001.xml .*'wolf' is not a class"]),
    "broken XML": ("boxes", lambda r: truncate(xml(r)), ["Annotations/2008_000001.xml cannot be read"]),
    "no size": ("boxes", lambda r: replace(xml(r), "size>", "form>"), ["2008_000001.xml cannot be read"]),
    "empty box": ("boxes", lambda r: replace(xml(r), "<xmax>30<", "<xmax>2<"), ["the box of a dog is not valid"]),
    "no box": ("boxes", lambda r: replace(xml(r), "bndbox", "box"), ["2008_000001.xml cannot be read"]),
    "flag 2": ("boxes", lambda r: replace(xml(r), "difficult>1", "difficult>2"), ["difficult or truncated of a dog"]),
    "XML of another size": (
        "boxes",
        lambda r: replace(xml(r), "<width>60", "<width>61"),
        ["JPEGImages/2008_000001.jpg is 60x40, but .*2008_000001.xml says 61x40"],
    ),
    "no XML": ("boxes", lambda r: xml(r).unlink(), ["missing: .*Annotations/2008_000001.xml", "--partial"]),
    "listed image missing": (
        "boxes",
        lambda r: (r / "VOC2012" / "JPEGImages" / f"{TRAIN[0]}.jpg").unlink(),
        ["missing: .*2008_000001.jpg", "1 images with missing files"],
    ),
    "truncated JPEG": (
        "boxes",
        lambda r: truncate(r / "VOC2012" / "JPEGImages" / f"{TRAIN[0]}.jpg"),
        ["Image .*2008_000001.jpg cannot be read"],
    ),
    "truncated PNG": (
        "seg",
        lambda r: truncate(png(r, "Object")),
        ["SegmentationObject/2008_000001.png cannot be"],
    ),
    "missing PNG": ("seg", lambda r: png(r, "Class").unlink(), ["missing: .*SegmentationClass/2008_000001.png"]),
    "PNG of another size": (
        "seg",
        lambda r: Image.new("P", (60, 41)).save(png(r, "Object")),
        [r"SegmentationObject/2008_000001.png is \(60, 41\), but VOC2012/JPEGImages/2008_000001.jpg is \(60, 40\)"],
    ),
    "PNG of colours": ("seg", lambda r: Image.new("RGB", (60, 40)).save(png(r, "Class")), ["has mode RGB"]),
    "no class": ("seg", blank_class, [r"instances \[1, 2\] of .*SegmentationObject/2008_000001.png have none of"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_and_nothing_is_written(root, case):
    source, spoil, messages = BAD[case]
    spoil(root)
    name = f"voc_2012_{source}_train"
    with pytest.raises(ValueError) as error:
        prepare_voc(root, [name])
    for message in [*messages, f"train.txt names 3 images, the official list {VOC_SETS[name].num_images}"]:
        assert re.search(message, str(error.value)), str(error.value)
    (report,) = (root / "VOC2012" / "mnc_annotations").iterdir()
    assert report.name == f"{name}.json.problems.txt" and TRAIN[0] in report.read_text()


def test_a_second_run_removes_the_report(root):
    with pytest.raises(ValueError):
        prepare_voc(root, ["voc_2012_boxes_val"])
    prepare_voc(root, ["voc_2012_boxes_val"], partial=True)
    assert [x.name for x in (root / "VOC2012" / "mnc_annotations").iterdir()] == ["voc_2012_boxes_val.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "it is empty"),
        ("2008_000001 1\n2008_000002 -1", "not a list of image"),
        ("1\n2\n1\n", "names images twice: 1."),
    ],
)
def test_bad_lists_are_named(root, text, message):
    path = root / "VOC2012" / "ImageSets" / "Main" / "val.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        prepare_voc(root, ["voc_2012_boxes_val"], partial=True)
    assert str(path) in str(error.value)


def test_sets_that_are_not_there(root, caplog, capsys):
    """The small VOC 2007 has no masks, and no list of the sets that have."""
    assert main(["--root", str(root), "voc_2007_seg_train"]) == 1
    message = capsys.readouterr().err
    assert "Segmentation/train.txt" in message and "datasets/README.md" in message
    with caplog.at_level("INFO"):
        assert main(["--root", str(root), "--partial"]) == 0
    assert "voc_2007_seg_train is not prepared: missing:" in caplog.text
    written = {x.stem for folder in ("VOC2007", "VOC2012") for x in (root / folder / "mnc_annotations").iterdir()}
    assert written == {name for name, x in VOC_SETS.items() if x.source != "sds"} - {
        "voc_2007_seg_train",
        "voc_2007_seg_val",
        "voc_2007_seg_test",
    }


def test_palette():
    palette = voc_palette()
    assert palette.shape == (256, 3)
    expected = {
        1: (128, 0, 0),
        2: (0, 128, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        VOID: (224, 224, 192),
    }
    for index, colour in expected.items():
        assert tuple(palette[index]) == colour


def test_registered_at_import():
    for name, voc_set in VOC_SETS.items():
        metadata = MetadataCatalog.get(name)
        assert name in DatasetCatalog
        assert metadata.json_file == voc_set.json_file(os.getenv("DETECTRON2_DATASETS", "datasets"), name)
        assert metadata.evaluator_type == "sds"
        assert metadata.has_all_masks == (voc_set.source != "boxes")
    for name in (*VOC_SETS, *VOC_UNIONS):
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == list(VOC_CLASSES) == MetadataCatalog.get("voc_2007_trainval").thing_classes
        assert metadata.thing_colors[14] == [192, 128, 128]
        assert metadata.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(20)}
    # Detectron2's own stay.
    assert MetadataCatalog.get("voc_2007_test").evaluator_type == "pascal_voc"


def test_a_dataset_that_is_not_prepared_says_what_to_do(tmp_path, clean_catalogs):
    register_voc_set("sds", VOC_SETS["voc_2012_sds_train"], str(tmp_path))
    register_voc_set("boxes", VOC_SETS["voc_2007_boxes_test"], str(tmp_path))
    register_union("both", ("boxes", "sds"))
    for name, file, command in [
        ("sds", "VOC2012/mnc_annotations/sds.json", "prepare_sbd.py"),
        ("both", "VOC2007/mnc_annotations/boxes.json", "prepare_voc.py"),
    ]:
        for use in (prepare_dataset, DatasetCatalog.get):
            with pytest.raises(FileNotFoundError) as error:
                use(name)
            assert str(tmp_path / file) in str(error.value) and f"python datasets/{command}" in str(error.value)


def test_union_for_mixed_supervision(root, clean_catalogs):
    names = ("voc_2007_boxes_trainval", "voc_2007_boxes_test", "voc_2012_seg_train")
    prepare_voc(root, names, partial=True)
    for name in names:
        voc_set = VOC_SETS[name]
        os.rename(voc_set.json_file(root, name), voc_set.json_file(root, f"small_{name}"))
        register_voc_set(f"small_{name}", voc_set, str(root))
    register_union("union", tuple(f"small_{name}" for name in names))
    prepare_dataset("union")
    records = DatasetCatalog.get("union")
    assert [x["image_id"] for x in records] == [5, 6, 7, 2008000001, 2008000002, 2008000003]
    mapper = MNCDatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True)
    for record in records:
        scene = {**SCENES, **SCENES_2007}[Path(record["file_name"]).stem]
        assert flags(record["annotations"]) == [x[5:] for x in scene.objects]
        instances = mapper(record)["instances"]
        assert (instances.gt_classes + 1).tolist() == scene.categories
        assert instances.gt_has_mask.tolist() == [record["image_id"] > 100] * len(instances)


def test_datasets_of_detectron2_go_with_ours(root, clean_catalogs):
    register_pascal_voc("voc_2007_theirs", str(root / "VOC2007"), "trainval", 2007)
    prepare_dataset("voc_2007_theirs")
    mapper = MNCDatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True)
    record = DatasetCatalog.get("voc_2007_theirs")[0]
    assert mapper(record)["instances"].gt_has_mask.tolist() == [False, False]

    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("voc_2007_trainval", "voc_2012_sds_train", *VOC_UNIONS)
    cfg.DATASETS.TEST = ("voc_2012_sds_val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = -1
    assert num_classes_from_datasets(cfg) == 20


def test_missing_datasets_of_detectron2_are_named(tmp_path, clean_catalogs):
    register_pascal_voc("absent", str(tmp_path / "VOC2007"), "trainval", 2007)
    with pytest.raises(FileNotFoundError, match="'absent' needs .*VOC2007, which does not exist.*datasets/README.md"):
        prepare_dataset("absent")


def test_a_part_of_a_dataset_is_noticed_when_it_is_loaded(root, clean_catalogs, caplog):
    prepare_voc(root, ["voc_2012_seg_val"], partial=True)
    voc_set = VOC_SETS["voc_2012_seg_val"]
    os.rename(voc_set.json_file(root, "voc_2012_seg_val"), voc_set.json_file(root, "part"))
    register_voc_set("part", voc_set, str(root))
    with caplog.at_level("WARNING"):
        DatasetCatalog.get("part")
    assert "'part' has 2 images, officially 1449" in caplog.text


def test_an_image_that_exif_data_turn_is_refused(root):
    path = root / "VOC2012" / "JPEGImages" / f"{VAL[0]}.jpg"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    with pytest.raises(ValueError, match=f"{VAL[0]}.jpg has the EXIF orientation 6"):
        prepare_voc(root, ["voc_2012_boxes_val"], partial=True)
