"""Datasets in YOLO's, labelme's, VOC's and COCO's formats: the same instances from each; what is wrong is named."""

import base64
import io
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from data.voc_tree import SCENES, TRAIN, VAL, void_border, write_list, write_voc2012
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from mnc_d2.data import register_coco_dataset
from mnc_d2.data.formats import convert_dataset, describe_dataset, split_dataset
from mnc_d2.data.masks import to_rle

pytestmark = pytest.mark.usefixtures("clean_catalogs")
H, W = 40, 60
SQUARE = [(10, 10), (30, 10), (30, 25), (10, 25)]
TRIANGLE = [(40, 5), (58, 5), (58, 35)]


def polygon(points):
    return [float(x) for point in points for x in point]


def normalised(points):
    return " ".join(f"{x / W:.6f} {y / H:.6f}" for x, y in points)


def write_image(path, size=(W, H)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


@pytest.fixture
def yolo(tmp_path):
    root = tmp_path / "yolo"
    for part, names in (("train", "ab"), ("val", "c")):
        for name in names:
            write_image(root / "images" / part / f"{name}.png")
            (root / "labels" / part).mkdir(parents=True, exist_ok=True)
    (root / "labels/train/a.txt").write_text(f"1 {normalised(SQUARE)}\n\n0 {normalised(TRIANGLE)}\n")
    (root / "labels/val/c.txt").write_text("0 0.5 0.5 0.2 0.4\n")  # a box; b.png has no file: no instance
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n")
    return root


def labelme_shape(label, points, kind="polygon", **fields):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **fields}


def write_labelme(root, name, *shapes, **fields):
    write_image(root / f"{name}.png")
    content = {"version": "5.4.1", "imagePath": f"{name}.png", "imageHeight": H, "imageWidth": W, "shapes": shapes}
    (root / f"{name}.json").write_text(json.dumps({**content, **fields}))


@pytest.fixture
def labelme(tmp_path):
    root = tmp_path / "labelme"
    write_labelme(root, "a", labelme_shape("dog", SQUARE), labelme_shape("cat", TRIANGLE))
    write_labelme(root, "b")
    return root


def read(paths):
    """Return by file name the instances as (class, mask or None, box), after all of COCO's checks."""
    json_file, root = paths
    register_coco_dataset("converted", json_file, root)
    names = {x["id"]: x["name"] for x in json.loads(open(json_file).read())["categories"]}
    result = {}
    for record in DatasetCatalog.get("converted"):
        size = record["height"], record["width"]
        result[record["file_name"].removeprefix(root + "/")] = [
            (
                names[x["category_id"] + 1],
                mask_util.decode(to_rle(x["segmentation"], *size)) if "segmentation" in x else None,
                x["bbox"],
            )
            for x in record["annotations"]
        ]
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove("converted")
    return result


def mask_of(points):
    return mask_util.decode(to_rle([polygon(points)], H, W))


def assert_square_and_triangle(instances):
    assert [name for name, *_ in instances] == ["dog", "cat"]
    for (_, mask, box), points in zip(instances, (SQUARE, TRIANGLE)):
        np.testing.assert_array_equal(mask, mask_of(points))
        assert box == mask_util.toBbox(to_rle([polygon(points)], H, W)).tolist()


def test_yolo(yolo, tmp_path):
    before = {path: path.read_bytes() for path in yolo.rglob("*") if path.is_file()}
    paths = convert_dataset(yolo, tmp_path / "out")
    assert convert_dataset(yolo / "data.yaml", tmp_path / "out") == paths
    assert paths == (str(tmp_path / "out" / "annotations.json"), str(yolo / "images"))
    found = read(paths)
    assert list(found) == ["train/a.png", "train/b.png", "val/c.png"]
    assert_square_and_triangle(found["train/a.png"])
    assert found["train/b.png"] == []
    ((name, mask, box),) = found["val/c.png"]
    assert (name, mask) == ("cat", None) and box == pytest.approx([24, 12, 12, 16])
    assert {path: path.read_bytes() for path in yolo.rglob("*") if path.is_file()} == before


def test_a_subset_of_yolo(yolo, tmp_path):
    json_file, root = convert_dataset(yolo, tmp_path, subset="val")
    assert json_file == str(tmp_path / "val.json")
    assert list(read((json_file, root))) == ["c.png"]
    with pytest.raises(ValueError, match=r"data\.yaml has no 'test'"):
        convert_dataset(yolo, tmp_path, subset="test")


def test_yolo_as_roboflow_writes_it_and_lists_of_images(yolo, tmp_path):
    (yolo / "list.txt").write_text("./images/val/c.png\n")
    (yolo / "data.yaml").write_text("train: [../images/train, list.txt]\nnames: [cat, dog]\nnc: 2\n")
    assert len(read(convert_dataset(yolo, tmp_path))) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0 0 1 0 1 1", "the class is 2, not an integer from 0 to 1"),
        ("cat 0 0 1 0 1 1", "the class is cat"),
        ("0 0 0 1 0 1", "5 numbers after the class"),
        ("0", "0 numbers after the class"),
        ("0 0 0 30 0 30 30", "not between 0 and 1"),
        ("0 0 0 nan 0 1 1", "not between 0 and 1"),
        ("0 0 0 x 0 1 1", "could not convert string to float: 'x'"),
        ("0 0.5 0.5 0.5 0.5 0.5 0.5", "segmentation covers no pixel"),
        ("0 0.5 0.5 0 0.2", "no width or no height"),
    ],
)
def test_a_bad_line_of_yolo_is_named(yolo, tmp_path, line, message):
    (yolo / "labels/train/a.txt").write_text(f"\n1 {normalised(SQUARE)}\n{line}\n")
    with pytest.raises(ValueError, match=rf"yolo has 1 problems\. .*labels/train/a\.txt, line 3: .*{message}"):
        convert_dataset(yolo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: images/train\n", "'names' is not a list"),
        ("train: images/train\nnames: {1: a}\n", "keys of 'names'"),
        ("train: nowhere\nnames: [a]\n", "'train' is nowhere, which does not exist"),
        ("names: [a]\n", "has no 'train'"),
        ("[", "is not a YAML file"),
        ("names: !!python/object/apply:os.getcwd []\n", "is not a YAML file"),
        ("a", "has no 'names'"),
    ],
)
def test_a_bad_data_yaml_is_named(yolo, tmp_path, content, message):
    (yolo / "data.yaml").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"data\.yaml.*{message}"):
        convert_dataset(yolo, tmp_path)


def test_labels_of_no_image_and_bad_images_are_named(yolo, tmp_path):
    (yolo / "labels/train/lost.txt").write_text("")
    (yolo / "images/train/b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2 problems\. Image .*b\.png cannot be read.*lost\.txt is of no image"):
        convert_dataset(yolo, tmp_path)


def test_labelme(labelme, tmp_path):
    found = read(convert_dataset(labelme, tmp_path))
    assert list(found) == ["a.png", "b.png"] and found["b.png"] == []
    assert_square_and_triangle(found["a.png"])


def test_shapes_of_labelme(tmp_path):
    piece = np.zeros((6, 8), np.uint8)
    piece[2:, 1:5] = 255
    png = io.BytesIO()
    Image.fromarray(piece).save(png, "PNG")
    mask = base64.b64encode(png.getvalue()).decode()
    root = tmp_path / "labelme"
    write_labelme(
        root,
        "a",
        labelme_shape("a", [[20, 15], [5, 8]], "rectangle"),
        labelme_shape("a", [[30, 20], [30, 30]], "circle"),
        labelme_shape("b", [[10, 30], [17, 35]], "mask", mask=mask),
        labelme_shape("c", SQUARE, group_id=1),
        labelme_shape("c", [[40, 5], [57, 20]], "rectangle", group_id=1),
        labelme_shape("__ignore__", [[0, 0]], "point"),
        imagePath="..\\labelme\\a.png",
    )
    rectangle, circle, piece_of_mask, parts = read(convert_dataset(root, tmp_path))["a.png"]
    assert rectangle[2] == [5, 8, 15, 7] and rectangle[1].sum() == 15 * 7
    assert circle[1].sum() == pytest.approx(np.pi * 100, rel=0.03)  # 64 corners, whole pixels
    expected = np.zeros((H, W), np.uint8)
    expected[30:36, 10:18] = piece > 0
    np.testing.assert_array_equal(piece_of_mask[1], expected)
    np.testing.assert_array_equal(parts[1], mask_of(SQUARE) | mask_of([(40, 5), (57, 5), (57, 20), (40, 20)]))


def test_labels_txt_gives_the_order_of_labelmes_classes(labelme, tmp_path):
    (labelme / "labels.txt").write_text("__ignore__\n_background_\ndog\ncat\n")
    json_file, _ = convert_dataset(labelme, tmp_path)
    assert [x["name"] for x in json.loads(open(json_file).read())["categories"]] == ["dog", "cat"]
    (labelme / "labels.txt").write_text("dog\n")
    with pytest.raises(ValueError, match=r"a\.json, shape 2 \(cat\): the label is not in .*labels\.txt"):
        convert_dataset(labelme, tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (labelme_shape("a", [[1, 1], [5, 5]], "line"), r"shape 1 \(a\): a line has no area"),
        (labelme_shape("a", [[1, 1], [5, 5]]), "fewer than three points"),
        (labelme_shape("a", [[1, 1], [5, "5"], [3, 3]]), "pairs of finite numbers"),
        (labelme_shape("a", [[1, 1], [1e9, 5], [3, 3]]), "reaches more than 4 image sizes out"),
        (labelme_shape("a", [[1, 1]], "rectangle"), "a rectangle has two points, not 1"),
        (labelme_shape("a", [[1, 1], [2, 2]], "mask", mask="?"), r"shape 1 \(a\): "),
        (labelme_shape("a", [[1, 1], [2, 2]], "mask", mask="AAAA"), r"shape 1 \(a\): cannot identify"),
        ({"points": []}, "shape 1 has no label"),
        (labelme_shape("\ud800", SQUARE), "shape 1 has no label"),  # half a character, which cannot be printed
    ],
)
def test_a_bad_shape_of_labelme_is_named(labelme, tmp_path, shape, message):
    write_labelme(labelme, "b", shape)
    with pytest.raises(ValueError, match=rf"labelme has 1 problems\. .*b\.json.*{message}"):
        convert_dataset(labelme, tmp_path)


def test_a_bad_file_of_labelme_is_named(labelme, tmp_path):
    (labelme / "b.json").write_text('{\n"shapes": [,')
    with pytest.raises(ValueError, match=r"b\.json: Expecting value: line 2 column 12"):
        convert_dataset(labelme, tmp_path)
    write_labelme(labelme, "b", imageWidth=W + 1)
    with pytest.raises(ValueError, match=r"b\.json: it says 61x40, but its image is 60x40"):
        convert_dataset(labelme, tmp_path)
    write_labelme(labelme, "b", imagePath="c.png")
    with pytest.raises(ValueError, match=r"b\.json: its image .*c\.png does not exist"):
        convert_dataset(labelme, tmp_path)


def test_voc(tmp_path):
    write_voc2012(tmp_path)
    found = read(convert_dataset(tmp_path / "VOC2012", tmp_path))
    assert list(found) == [f"{name}.jpg" for name in (*TRAIN, *VAL)]
    for name, scene in SCENES.items():
        instances = found[f"{name}.jpg"]
        assert [x[0] for x in instances] == [x[0] for x in scene.objects]
        for (_, mask, _), expected in zip(instances, scene.masks()):
            np.testing.assert_array_equal(mask, expected & ~void_border(scene.instance_map))
    assert list(read(convert_dataset(tmp_path / "VOC2012", tmp_path, subset="val"))) == [f"{x}.jpg" for x in VAL]


def test_voc_of_other_classes(tmp_path):
    write_voc2012(tmp_path)
    folder = tmp_path / "VOC2012"
    (folder / "class_names.txt").write_text("\n".join(["_background_", *(f"class {i}" for i in range(1, 21))]))
    found = read(convert_dataset(folder, tmp_path))
    assert [x[0] for x in found["2008_000001.jpg"]] == ["class 12"] * 2  # dog
    (folder / "class_names.txt").write_text("only\n")
    with pytest.raises(ValueError, match=r"SegmentationObject/2008_000001\.png, instance 1: its class in .* is 12"):
        convert_dataset(folder, tmp_path)


def test_bad_files_of_voc_are_named(tmp_path):
    write_voc2012(tmp_path)
    folder = tmp_path / "VOC2012"
    (folder / "SegmentationClass" / f"{TRAIN[0]}.png").unlink()
    Image.new("P", (5, 5)).save(folder / "SegmentationObject" / f"{TRAIN[1]}.png")
    write_list(folder / "ImageSets" / "Segmentation" / "mine.txt", [TRAIN[0], TRAIN[1], "none"])
    with pytest.raises(ValueError) as error:
        convert_dataset(folder, tmp_path, subset="mine")
    for part in (f"SegmentationClass/{TRAIN[0]}.png cannot be read", f"{TRAIN[1]}.png is 5x5, but", "no image none"):
        assert part in str(error.value)


def test_coco_is_checked_and_returned_as_it_is(coco_dataset, tmp_path):
    path, root = coco_dataset
    expected = str(path), str(root)
    assert convert_dataset(path, tmp_path) == convert_dataset(root, tmp_path) == expected
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for name in ("train", "val"):
        (tmp_path / "annotations" / f"{name}.json").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"several COCO files: annotations/train\.json, annotations/val\.json\."):
        convert_dataset(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"val\.json: images that do not exist: .*images/1\.png"):
        convert_dataset(tmp_path, tmp_path, subset="val")
    found = convert_dataset(tmp_path, tmp_path, subset="val", image_root=root)
    assert found == (str(tmp_path / "annotations" / "val.json"), str(root))


def test_unknown_formats_are_told_what_is_known(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        convert_dataset(tmp_path / "nowhere", tmp_path)
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"in none of these formats: COCO .*YOLO.*VOC.*labelme"):
        convert_dataset(tmp_path, tmp_path)


def test_a_second_conversion_takes_the_place_of_the_first_and_of_nothing_else(labelme, tmp_path):
    json_file, _ = convert_dataset(labelme, tmp_path)
    write_labelme(labelme, "c", labelme_shape("cat", SQUARE))
    assert len(read(convert_dataset(labelme, tmp_path))) == 3
    for content in ("{}", "mine"):
        open(json_file, "w").write(content)
        with pytest.raises(ValueError, match=r"annotations\.json is there, and not from an earlier conversion"):
            convert_dataset(labelme, tmp_path)
        assert open(json_file).read() == content


# ---- division and counts


def write_coco(path, num_images, reverse=False):
    images = [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in range(num_images)]
    annotations = [{"id": i + 1, "image_id": i % num_images, "category_id": 1} for i in range(3 * num_images)]
    dataset = {"images": images[::-1] if reverse else images, "annotations": annotations, "categories": []}
    path.write_text(json.dumps({**dataset, "info": {"year": 2015}}))
    return path


def test_a_division_is_of_images_with_their_annotations(tmp_path):
    path = write_coco(tmp_path / "all.json", 10)
    before = path.read_bytes()
    parts = [json.loads(open(x).read()) for x in split_dataset(path, tmp_path / "out", val_fraction=0.3, seed=1)]
    assert [len(part["images"]) for part in parts] == [7, 3]
    ids = [{x["id"] for x in part["images"]} for part in parts]
    assert ids[0] | ids[1] == set(range(10)) and not ids[0] & ids[1]
    for part, own in zip(parts, ids):
        assert sorted(x["image_id"] for x in part["annotations"]) == sorted([*own] * 3)
        assert part["info"] == {"year": 2015}
    assert path.read_bytes() == before


def test_a_division_depends_on_the_seed_and_not_on_the_order(tmp_path):
    divisions = []
    for seed, reverse in ((1, False), (1, True), (2, False)):
        path = write_coco(tmp_path / "all.json", 20, reverse)
        _, val = split_dataset(path, tmp_path / "out", seed=seed)
        divisions.append({x["id"] for x in json.loads(open(val).read())["images"]})
    assert divisions[0] == divisions[1] != divisions[2]


def test_divisions_that_cannot_be_are_named(tmp_path):
    path = write_coco(tmp_path / "train.json", 1)
    with pytest.raises(ValueError, match=r"train\.json has 1 images"):
        split_dataset(path, tmp_path / "out")
    path = write_coco(tmp_path / "train.json", 4)
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_dataset(path, tmp_path / "out", val_fraction=fraction)
    with pytest.raises(ValueError, match=r"train\.json into .* would overwrite it"):
        split_dataset(path, tmp_path)
    path.write_text(path.read_text().replace('"image_id": 3', '"image_id": 33'))
    with pytest.raises(ValueError, match=r"train\.json: annotations of images that are not in it: 33, 33, 33\."):
        split_dataset(path, tmp_path / "out")


def test_counts(yolo, tmp_path):
    summary = describe_dataset(*convert_dataset(yolo, tmp_path))
    assert (summary.num_images, summary.num_empty_images, summary.num_box_only, summary.num_crowds) == (3, 1, 1, 0)
    assert summary.instances == {"cat": 2, "dog": 1}
    assert summary.instance_sizes == {"small": 3, "medium": 0, "large": 0}
    assert summary.image_sizes == ((W, H), (W, H))
    lines = [line.split() for line in str(summary).splitlines()]
    assert ["images", "3"] in lines and ["cat", "2"] in lines and ["smallest", "60", "x", "40"] in lines
