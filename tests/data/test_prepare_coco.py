"""The check of COCO's files."""

import json

import pytest
from PIL import Image

from mnc_d2.data.prepare import coco
from mnc_d2.data.prepare.coco import check_coco, main


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A COCO 2017 val of two images."""
    monkeypatch.setitem(coco.COCO_SETS, "coco_2017_val", ("val2017", 2))
    images = [{"id": i, "file_name": f"{i:012}.jpg", "height": 8, "width": 9} for i in (1, 2)]
    (tmp_path / "coco" / "val2017").mkdir(parents=True)
    for image in images:
        Image.new("RGB", (9, 8)).save(tmp_path / "coco" / "val2017" / image["file_name"])
    (tmp_path / "coco" / "annotations").mkdir()
    dataset = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(dataset))
    return tmp_path


def test_a_complete_one_passes(root, caplog):
    with caplog.at_level("INFO"):
        assert main(["--root", str(root), "coco_2017_val"]) == 0
    assert "coco_2017_val: 2 images, 0 annotations" in caplog.text


def test_missing_images_are_named(root):
    (root / "coco" / "val2017" / "000000000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="do not exist: .*000000000002.jpg"):
        check_coco(str(root), ["coco_2017_val"])


def test_annotations_of_another_number_of_images(root, monkeypatch):
    monkeypatch.setitem(coco.COCO_SETS, "coco_2017_val", ("val2017", 5000))
    with pytest.raises(ValueError, match="instances_val2017.json has 2 images, coco_2017_val has 5000"):
        check_coco(str(root), ["coco_2017_val"])


def test_by_default_2017_is_checked(root, capsys):
    assert main(["--root", str(root)]) == 1
    assert "instances_train2017.json does not exist" in capsys.readouterr().err
