"""Whatever the annotations and the images hold: a result, or a sentence that names the file, and nothing changed.

A crash of pycocotools or Pillow would end pytest itself.
"""

import io
import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from mnc_d2.data import MNCDatasetMapper, register_coco_dataset
from mnc_d2.data.formats import convert_dataset
from mnc_d2.data.images import ImageError, read_image, read_image_size
from mnc_d2.evaluation.ground_truth import load_ground_truth

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is an optional extra: pip install 'mnc_d2[dev]'")
from hypothesis import given, settings, strategies  # noqa: E402

# The same examples in every run, and few of them.
PROFILE = settings(derandomize=True, deadline=None, database=None, max_examples=100)
H, W = 12, 16
NAME = "property"


def valid_dataset():
    polygon = [[2, 2, 9, 2, 9, 8, 2, 8]]
    rle = {"size": [H, W], "counts": [20, 30, 142]}
    masks = [polygon, rle, None, polygon + [[1, 1]]]
    annotations = [
        {"id": i, "image_id": 1 + i % 2, "category_id": 1, "bbox": [2, 2, 7, 6], "area": 42, "iscrowd": int(i == 4)}
        for i in (1, 2, 3, 4)
    ]
    for annotation, mask in zip(annotations, masks):
        if mask is not None:
            annotation["segmentation"] = mask
    del annotations[0]["bbox"]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in (1, 2)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 5, "name": "b"}],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in (1, 2):
        Image.new("RGB", (W, H)).save(root / f"{i}.png")
    return root


numbers = strategies.one_of(
    strategies.integers(-20, 40),
    strategies.floats(),
    strategies.sampled_from([3e7, -1e9, 1e300, 10**400, -(10**400), 2**31, 2**32, 2**63, 0.5, -0.0, True]),
)
scalars = strategies.one_of(
    numbers, strategies.none(), strategies.text(max_size=4), strategies.sampled_from(["yes", "1"])
)
values = strategies.one_of(
    scalars,
    strategies.lists(numbers, max_size=10),
    strategies.lists(strategies.lists(numbers, min_size=4, max_size=10), max_size=3),
    strategies.fixed_dictionaries(
        {"size": strategies.sampled_from([[H, W], [W, H], [float(H), W], [2**32, 2**32]])},
        optional={"counts": strategies.one_of(strategies.lists(numbers, max_size=6), strategies.text(max_size=12))},
    ),
    strategies.recursive(scalars, lambda x: strategies.lists(x, max_size=3), max_leaves=6),
)


@strategies.composite
def datasets(draw):
    """A valid dataset with a few of its values replaced, added or removed."""
    dataset = valid_dataset()
    for _ in range(draw(strategies.integers(0, 2))):
        kind = draw(strategies.sampled_from(["annotations", "annotations", "annotations", "images", "categories"]))
        record = draw(strategies.sampled_from(dataset[kind]))
        keys = {"annotations": ["segmentation", "bbox", "area", "iscrowd", "ignore", "difficult", "keypoints"]}
        key = draw(strategies.sampled_from([*record, *keys.get(kind, [])]))
        if draw(strategies.integers(0, 9)) == 0:
            record.pop(key, None)
        else:
            record[key] = draw(values)
    return dataset


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use(text, folder):
    """Register the annotations, map every record and read the ground truth; return the records and what became of them.

    What goes wrong must be a sentence that names a file.
    """
    path = folder / "annotations.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    before = contents(folder)
    try:
        register_coco_dataset(NAME, str(path), str(folder))
    except (ValueError, OSError) as error:
        assert type(error) in (ValueError, FileNotFoundError), error
        assert "annotations.json" in str(error) and "\n" not in str(error).strip()
        str(error).encode("utf-8")  # can be printed
        return None
    else:
        mapper = MNCDatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True)
        records = DatasetCatalog.get(NAME)
        truth = load_ground_truth(NAME)
        assert len(truth.images) == len(records)
        return [(record, mapper(record)["instances"]) for record in records]
    finally:
        assert contents(folder) == before
        if NAME in DatasetCatalog:
            DatasetCatalog.remove(NAME)
        if NAME in MetadataCatalog:
            MetadataCatalog.remove(NAME)


def test_the_valid_dataset_is_valid(folder):
    assert [len(instances) for _, instances in use(json.dumps(valid_dataset()), folder)] == [1, 2]


@PROFILE
@given(dataset=datasets())
def test_a_damaged_dataset_is_refused_in_a_sentence_or_loses_no_instance(folder, dataset):
    for record, instances in use(json.dumps(dataset), folder) or ():
        assert len(instances) == sum(is_instance(anno) for anno in record["annotations"])


def is_instance(annotation):
    """Whether it is one to train on: no crowd, with a box that has an area and, if any, a mask that has a pixel."""
    masks = annotation.get("segmentation") or []
    if isinstance(masks, list):
        masks = mask_util.frPyObjects(masks, H, W) if masks else masks
    elif isinstance(masks["counts"], list):
        masks = mask_util.frPyObjects(masks, H, W)
    has_pixel = not masks or np.any(mask_util.area(masks) > 0)
    return not annotation.get("iscrowd", 0) and min(annotation["bbox"][2:]) > 0 and bool(has_pixel)


@PROFILE
@given(
    text=strategies.one_of(
        strategies.text(max_size=30),
        strategies.recursive(
            scalars, lambda x: strategies.lists(x, max_size=3) | strategies.dictionaries(strategies.text(max_size=3), x)
        ).map(json.dumps),
        strategies.fixed_dictionaries(
            {
                key: strategies.lists(
                    strategies.dictionaries(strategies.sampled_from(["id", "name", "file_name"]), scalars)
                )
                for key in ("images", "annotations", "categories")
            }
        ).map(json.dumps),
    )
)
def test_any_file_is_refused_in_a_sentence(folder, text):
    assert use(text, folder) is None


def convert(root, out):
    """Convert a folder; return the annotations, or None where it was refused in a sentence."""
    before = contents(root)
    try:
        json_file, _ = convert_dataset(root, out)
    except (ValueError, OSError) as error:
        assert str(root) in str(error) and "\n" not in str(error)
        return None
    finally:
        assert contents(root) == before
    return json.loads(Path(json_file).read_text())["annotations"]


words = strategies.one_of(numbers.map(str), strategies.floats(-0.1, 1.1).map(str), strategies.text(max_size=3))


@PROFILE
@given(lines=strategies.lists(strategies.lists(words, max_size=9).map(" ".join), max_size=2))
def test_any_line_of_yolo_is_an_instance_or_refused_in_a_sentence(folder, lines):
    root = folder / "yolo"
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (W, H)).save(root / "images" / "a.png")
    (root / "data.yaml").write_text("train: images\nnames: [a, b]\n")
    valid = "0 0.1 0.1 0.9 0.1 0.9 0.9"
    (root / "labels" / "a.txt").write_text("\n".join([valid, *lines]), encoding="utf-8", errors="surrogatepass")
    annotations = convert(root, folder / "out_yolo")
    if annotations is not None:
        assert len(annotations) == 1 + sum(bool(x.strip()) for line in lines for x in line.splitlines())


@PROFILE
@given(
    fields=strategies.dictionaries(
        strategies.sampled_from(["label", "points", "shape_type", "group_id", "mask"]),
        values
        | strategies.sampled_from(["rectangle", "circle", "mask", "line", [[1, 1], [9, 9]], [[0, 0], [0, 1e308]]]),
    ),
    place=strategies.sampled_from(["imagePath", "imageHeight", "shapes", None]),
    value=values,
)
def test_any_shape_of_labelme_is_an_instance_or_refused_in_a_sentence(folder, fields, place, value):
    root = folder / "labelme"
    root.mkdir(exist_ok=True)
    Image.new("RGB", (W, H)).save(root / "a.png")
    shapes = [{"label": "a", "points": [[2, 2], [9, 2], [9, 9]], "shape_type": "polygon"}]
    content = {"imagePath": "a.png", "imageHeight": H, "imageWidth": W, "shapes": [*shapes, {**shapes[0], **fields}]}
    if place is not None:
        content[place] = value
    (root / "a.json").write_text(json.dumps(content))
    annotations = convert(root, folder / "out_labelme")
    assert annotations is None or annotations


def encode(mode, suffix):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 4096, (H, W), dtype=np.uint16))
    elif mode == "F":
        image = Image.fromarray(rng.random((H, W), dtype=np.float32))
    else:
        image = Image.fromarray(rng.integers(0, 256, (H, W, 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, suffix)
    return file.getvalue()


FILES = [
    encode(mode, suffix)
    for suffix, modes in {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "TIFF": ("L", "RGB", "CMYK", "I;16", "F"),
        "BMP": ("L", "P", "RGB"),
        "WEBP": ("RGB", "RGBA"),
        "PPM": ("L", "RGB"),
        "GIF": ("P",),
    }.items()
    for mode in modes
]


@settings(PROFILE, max_examples=300)
@given(
    data=strategies.sampled_from(FILES),
    changes=strategies.lists(strategies.tuples(strategies.floats(0, 0.999), strategies.binary(max_size=3)), max_size=3),
    length=strategies.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5, 0.1, 0.0]),
)
def test_a_damaged_image_is_read_in_its_size_or_refused_in_a_sentence(folder, data, changes, length):
    content = bytearray(data)
    for place, new in changes:
        start = int(place * len(content))
        content[start : start + len(new)] = new
    path = folder / "image"
    path.write_bytes(bytes(content[: int(length * len(content))]))
    try:
        size = read_image_size(path)
        if size[0] * size[1] > 10**6:  # a header that claims so much takes seconds, and is checked by Pillow's limit
            return
        image = read_image(path)
    except ImageError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.shape == (size[1], size[0], 3)
    finally:
        path.unlink()
