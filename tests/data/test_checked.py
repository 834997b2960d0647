"""A dataset that was found right is not checked again, one that has changed is."""

import json
import os
import time

import pytest
from PIL import Image

from mnc_d2.data import coco_checks
from mnc_d2.data.coco_checks import check_coco_dataset
from mnc_d2.data.images import read_image_size

OLD = time.time() - 3600


def write(path, content):
    """Write a file as if an hour ago."""
    path.write_bytes(content)
    os.utime(path, (OLD, OLD))


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Annotations and image root of two images, of which one instance covers no pixel; and what was read of them."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in (1, 2)]
    annotations = [
        {"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8], "segmentation": [[1, 1, 9, 1, 9, 9]]},
        {"id": 6, "image_id": 2, "category_id": 1, "bbox": [1, 1, 0, 8], "segmentation": [[1, 1, 1, 9, 1, 5]]},
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    write(tmp_path / "train.json", json.dumps(content).encode())
    for image in images:
        Image.new("RGB", (20, 10)).save(tmp_path / image["file_name"])
        write(tmp_path / image["file_name"], (tmp_path / image["file_name"]).read_bytes())
    read = []
    monkeypatch.setattr(coco_checks, "read_image_size", lambda path: read.append(path) or read_image_size(path))
    return tmp_path / "train.json", tmp_path, read


def test_it_is_checked_once(dataset):
    file, root, read = dataset
    first = check_coco_dataset(str(file), str(root))
    assert first[1] == [6] and len(read) == 2
    assert check_coco_dataset(str(file), str(root)) == first
    assert check_coco_dataset(str(file), str(root), files=False) == first
    assert len(read) == 2


@pytest.mark.parametrize("name", ["train.json", "2.png"])
def test_a_file_of_another_time_is_checked_again(dataset, name):
    file, root, read = dataset
    check_coco_dataset(str(file), str(root))
    os.utime(root / name, (OLD, OLD + 1))
    check_coco_dataset(str(file), str(root))
    assert len(read) == 4


def test_an_image_of_another_size_is_checked_again(dataset):
    file, root, _ = dataset
    check_coco_dataset(str(file), str(root))
    Image.new("RGB", (30, 10)).save(root / "2.png")
    write(root / "2.png", (root / "2.png").read_bytes())
    with pytest.raises(ValueError, match="30x10, not 20x10"):
        check_coco_dataset(str(file), str(root))
    (root / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.png"):
        check_coco_dataset(str(file), str(root))


def test_a_check_without_the_images_is_none_of_them(dataset):
    file, root, read = dataset
    check_coco_dataset(str(file), str(root), files=False)
    check_coco_dataset(str(file), str(root))
    assert len(read) == 2


def test_files_that_were_just_written_are_checked_again(dataset):
    file, root, read = dataset
    os.utime(root / "2.png")
    for _ in range(2):
        check_coco_dataset(str(file), str(root))
    assert len(read) == 4


def test_other_checks_check_again(dataset, monkeypatch, tmp_path):
    file, root, read = dataset
    check_coco_dataset(str(file), str(root))
    (tmp_path / "checks.py").write_text("# stricter")
    monkeypatch.setattr(coco_checks, "_MODULES", (str(tmp_path / "checks.py"),))
    check_coco_dataset(str(file), str(root))
    assert len(read) == 4


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"state": 3}'])
def test_a_damaged_cache_is_none(dataset, content, monkeypatch, tmp_path):
    file, root, read = dataset
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    check_coco_dataset(str(file), str(root))
    (path,) = (tmp_path / "cache").rglob("*.json")
    path.write_text(content)
    check_coco_dataset(str(file), str(root))
    assert len(read) == 4


def test_without_a_place_for_the_cache_it_is_checked_every_time(dataset, monkeypatch, tmp_path):
    file, root, read = dataset
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        check_coco_dataset(str(file), str(root))
    assert len(read) == 4
