"""The embedded dataset: deterministic, valid, and safe to prepare from several processes."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO

from mnc_d2.data import (
    SHAPES_CLASSES,
    SHAPES_SPLITS,
    ShapesSpec,
    datasets_root,
    drawing,
    prepare_dataset,
    prepare_shapes,
    register_shapes,
    shapes,
)
from mnc_d2.data.drawing import draw_image
from mnc_d2.evaluation import build_evaluator

SPEC = ShapesSpec("test", num_images=3, seed=5, image_size=(96, 112))


@pytest.fixture
def registered(tmp_path):
    """Name of a shapes dataset whose files are not drawn yet, and its root."""
    name = "shapes_for_a_test"
    register_shapes(name, SPEC, root=str(tmp_path))
    yield name, tmp_path
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def contents(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_are_the_same_bytes_each_time(tmp_path):
    for name in ("a", "b"):
        prepare_shapes(str(tmp_path / name), SPEC)
    first = contents(tmp_path / "a")
    assert len(first) == SPEC.num_images + 1
    assert first == contents(tmp_path / "b")


def test_an_image_does_not_depend_on_the_others():
    alone, _ = draw_image(replace(SPEC, num_images=1000, split="other"), 2)
    np.testing.assert_array_equal(alone, draw_image(SPEC, 2)[0])
    assert not np.array_equal(alone, draw_image(replace(SPEC, seed=6), 2)[0])


@pytest.mark.parametrize("change", [{"seed": 6}, {"num_images": 4}, {"image_size": (112, 96)}, {"split": "other"}])
def test_spec_changes_the_folder(change):
    assert replace(SPEC, **change).folder != SPEC.folder


def test_drawing_version_changes_the_folder(monkeypatch):
    before = SPEC.folder
    monkeypatch.setattr(drawing, "DRAWING_VERSION", drawing.DRAWING_VERSION + 1)
    assert SPEC.folder != before


def test_train_and_val_do_not_share_images():
    assert SHAPES_SPLITS["shapes_train"].seed != SHAPES_SPLITS["shapes_val"].seed


def test_masks_are_visible_parts_and_disjoint():
    for index in range(20):
        image, instances = draw_image(SPEC, index)
        assert image.shape == (*SPEC.image_size, 3) and image.dtype == np.uint8
        assert instances
        masks = np.stack([mask for _, mask in instances])
        assert masks.sum(axis=0).max() <= 1
        assert masks.sum(axis=(1, 2)).min() >= drawing.MIN_PIXELS


def test_instances_occlude_one_another():
    """Some instance has a hole or a bite: it fills clearly less of its hull than any whole form of its class does."""
    spec = SHAPES_SPLITS["shapes_train"]
    fill = []
    for index in range(30):
        for label, mask in draw_image(spec, index)[1]:
            if SHAPES_CLASSES[label] == "disc":
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                fill.append(mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1)))
    assert max(fill) > 0.75 > 0.7 > min(fill)  # a whole ellipse fills pi / 4 of its box


def test_json_is_valid_coco_with_tight_boxes(tmp_path):
    json_file, image_root = prepare_shapes(str(tmp_path), SPEC)
    coco = COCO(json_file)
    assert len(coco.imgs) == len(list(Path(image_root).iterdir())) == SPEC.num_images
    assert [category["name"] for category in coco.dataset["categories"]] == list(SHAPES_CLASSES)
    assert coco.anns
    for anno in coco.anns.values():
        rows, columns = np.nonzero(coco.annToMask(anno))
        tight = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        np.testing.assert_array_equal(anno["bbox"], tight)
        assert anno["area"] == len(rows) > 0


def test_every_class_occurs():
    labels = {label for index in range(30) for label, _ in draw_image(SPEC, index)[1]}
    assert labels == set(range(len(SHAPES_CLASSES)))


def test_mean_colour_does_not_give_the_class_away():
    """The classes' mean colours are as close to one another as chance has them: within 5 standard errors."""
    colours = {label: [] for label in range(len(SHAPES_CLASSES))}
    for index in range(60):
        image, instances = draw_image(SHAPES_SPLITS["shapes_train"], index)
        for label, mask in instances:
            colours[label].append(image[mask].mean(axis=0))
    everything = np.concatenate(list(colours.values()))
    for values in colours.values():
        error = np.abs(np.mean(values, axis=0) - everything.mean(axis=0))
        assert (error < 5 * everything.std(axis=0) / len(values) ** 0.5).all()


def test_second_call_draws_nothing(tmp_path, monkeypatch):
    paths = prepare_shapes(str(tmp_path), SPEC)
    monkeypatch.setattr(shapes, "draw_image", lambda *_: pytest.fail("drawn again"))
    assert prepare_shapes(str(tmp_path), SPEC) == paths


def test_interrupted_drawing_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    def interrupt(spec, index):
        if index == 1:
            raise KeyboardInterrupt
        return draw_image(spec, index)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_shapes(str(tmp_path), SPEC)
    assert list(tmp_path.iterdir()) == []
    assert Path(prepare_shapes(str(tmp_path), SPEC)[0]).is_file()


def test_scratch_folder_of_a_killed_process_is_no_obstacle(tmp_path):
    stale = tmp_path / f"{SPEC.folder}.tmp-123-abc"
    (stale / "images").mkdir(parents=True)
    json_file, _ = prepare_shapes(str(tmp_path), SPEC)
    assert len(json.loads(Path(json_file).read_text())["images"]) == SPEC.num_images
    assert stale.is_dir()  # it might belong to a process that still draws


def test_process_that_loses_the_race_uses_the_winners_files(tmp_path, monkeypatch):
    write = shapes._write

    def write_while_another_finishes(folder, spec):
        monkeypatch.setattr(shapes, "_write", write)
        prepare_shapes(str(tmp_path), spec)
        write(folder, spec)

    monkeypatch.setattr(shapes, "_write", write_while_another_finishes)
    json_file, _ = prepare_shapes(str(tmp_path), SPEC)
    assert Path(json_file).is_file()
    assert [path.name for path in tmp_path.iterdir()] == [SPEC.folder]


def test_foreign_folder_of_the_same_name_is_named(tmp_path):
    (tmp_path / SPEC.folder).mkdir()
    (tmp_path / SPEC.folder / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError, match=SPEC.folder):
        prepare_shapes(str(tmp_path), SPEC)
    assert [path.name for path in tmp_path.iterdir()] == [SPEC.folder]


def test_metadata_is_there_without_drawing(registered):
    test_name, root = registered
    folders = {name: Path(datasets_root(), spec.folder) for name, spec in SHAPES_SPLITS.items()}
    folders[test_name] = root / SPEC.folder
    for name, folder in folders.items():
        assert name in DatasetCatalog
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == list(SHAPES_CLASSES)
        assert metadata.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(len(SHAPES_CLASSES))}
        assert metadata.evaluator_type == "coco"
        assert metadata.json_file == str(folder / "annotations.json")
        assert metadata.image_root == str(folder / "images")
    assert list(root.iterdir()) == []


def test_catalog_gives_detectron2_records(registered):
    name, root = registered
    records = DatasetCatalog.get(name)
    assert len(records) == SPEC.num_images
    for record in records:
        assert Path(record["file_name"]).is_file()
        image, instances = draw_image(SPEC, record["image_id"] - 1)
        assert [anno["category_id"] for anno in record["annotations"]] == [label for label, _ in instances]
        for anno, (_, mask) in zip(record["annotations"], instances):
            np.testing.assert_array_equal(mask_util.decode(anno["segmentation"]), mask)


def test_evaluator_can_be_built_before_the_loader(registered, small_config, tmp_path):
    """Detectron2's opens the metadata's file."""
    assert build_evaluator(small_config(), registered[0], str(tmp_path / "out"))
    evaluator = COCOEvaluator(registered[0], output_dir=str(tmp_path / "out"))
    assert len(evaluator._coco_api.imgs) == SPEC.num_images


def test_prepare_dataset_draws_shapes(registered):
    name, root = registered
    assert list(root.iterdir()) == []
    prepare_dataset(name)
    assert [path.name for path in root.iterdir()] == [SPEC.folder]


def test_metadata_can_be_copied(registered):
    """Worker processes get copies."""
    metadata = MetadataCatalog.get(registered[0])
    assert copy.deepcopy(metadata).json_file == metadata.json_file
