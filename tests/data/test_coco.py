"""Registration of COCO-format datasets: what is accepted, and what each bad file is told."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from PIL import Image

from mnc_d2.data import MNCDatasetMapper, num_classes_from_datasets, register_coco_dataset
from mnc_d2.data.masks import find_mask_problem, run_lengths

H, W = 30, 40
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def clean_catalogs():
    """Forget what a test registers."""
    before = set(DatasetCatalog), set(MetadataCatalog)
    yield
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before):
        for name in set(catalog) - names:
            catalog.remove(name)


def encoded(mask):
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def rectangle(x0, y0, x1, y1):
    mask = np.zeros((H, W), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.fixture
def dataset(tmp_path):
    """A valid dataset of three images, one of them without annotations, as a dict; its image files are written."""
    root = tmp_path / "images"
    root.mkdir()
    for i in (1, 2, 3):
        Image.new("RGB", (W, H)).save(root / f"{i}.png")
    polygon = [[5, 5, 20, 5, 20, 15, 5, 15]]
    rle, full = encoded(rectangle(1, 2, 10, 10)), {"size": [H, W], "counts": [0, H * W]}
    common, crowd = {"iscrowd": 0, "area": 150}, {"iscrowd": 1, "area": H * W}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in (1, 2, 3)],
        "categories": [{"id": 7, "name": "late"}, {"id": 3, "name": "early"}],
        "annotations": [
            {"id": 11, "image_id": 1, "category_id": 7, "bbox": [5, 5, 15, 10], "segmentation": polygon, **common},
            {"id": 12, "image_id": 1, "category_id": 3, "bbox": [1, 2, 9, 8], "segmentation": rle, **common},
            {"id": 13, "image_id": 2, "category_id": 3, "bbox": [0, 0, 9, 8], "segmentation": [], **common},
            {"id": 14, "image_id": 2, "category_id": 3, "bbox": [0, 0, W, H], "segmentation": full, **crowd},
        ],
    }


MISSING = object()


def put(dataset, path, value):
    """Set or, if it is MISSING, delete one value in nested dicts and lists."""
    *outer, key = path
    for k in outer:
        dataset = dataset[k]
    if value is MISSING:
        del dataset[key]
    else:
        dataset[key] = value


def table(names, rows):
    """Parametrize by a dict of rows: what is the matter, then the values of the names."""
    return pytest.mark.parametrize(names, list(rows.values()), ids=list(rows))


def register(dataset, tmp_path, name="test_set"):
    json_file = tmp_path / "annotations.json"
    json_file.write_text(dataset if isinstance(dataset, str) else json.dumps(dataset))
    register_coco_dataset(name, str(json_file), str(tmp_path / "images"))
    return name


def test_valid_dataset_loads(dataset, tmp_path):
    name = register(dataset, tmp_path)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["early", "late"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert metadata.evaluator_type == "coco"
    assert metadata.json_file == str(tmp_path / "annotations.json")
    records = DatasetCatalog.get(name)
    assert [len(record["annotations"]) for record in records] == [2, 2, 0]
    assert [anno["category_id"] for anno in records[0]["annotations"]] == [1, 0]
    assert records[0]["file_name"] == str(tmp_path / "images" / "1.png")


def test_crowd_and_box_only_instances_are_kept(dataset, tmp_path):
    name = register(dataset, tmp_path)
    box_only, crowd = DatasetCatalog.get(name)[1]["annotations"]
    assert "segmentation" not in box_only and box_only["bbox"] == [0, 0, 9, 8]
    assert crowd["iscrowd"] == 1
    assert MetadataCatalog.get(name).has_all_masks is False
    del dataset["annotations"][2]
    assert MetadataCatalog.get(register(dataset, tmp_path, "test_masks")).has_all_masks is True


def test_missing_box_is_the_masks(dataset, tmp_path):
    polygon, rle, _, crowd = dataset["annotations"]
    for anno in (polygon, rle, crowd):
        del anno["bbox"]
    records = DatasetCatalog.get(register(dataset, tmp_path))
    assert records[0]["annotations"][0]["bbox"] == [5, 5, 15, 10]
    assert records[0]["annotations"][1]["bbox"] == [1, 2, 9, 8]
    assert records[1]["annotations"][1]["bbox"] == [0, 0, W, H]


@pytest.mark.parametrize("key", ["bbox", "area", "iscrowd"])
def test_file_without_what_the_evaluator_needs_is_converted(dataset, tmp_path, key):
    del dataset["annotations"][1][key]
    name = register(dataset, tmp_path)
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"))
    annos = evaluator._coco_api.anns
    assert len(annos) == 4
    assert all({"bbox", "area", "iscrowd"} <= set(anno) for anno in annos.values())
    assert {anno["category_id"] for anno in annos.values()} == {3, 7}


def test_annotation_id_zero_is_renumbered_for_the_evaluator(dataset, tmp_path):
    """COCOeval counts a prediction that matches annotation 0 as a false positive."""
    dataset["annotations"][0]["id"] = 0
    evaluator = COCOEvaluator(register(dataset, tmp_path), output_dir=str(tmp_path / "out"))
    assert min(evaluator._coco_api.anns) == 1


def test_degenerate_part_of_a_polygon_is_left_out(dataset, tmp_path):
    dataset["annotations"][0]["segmentation"].append([1, 1, 2, 2])
    name = register(dataset, tmp_path)
    assert len(DatasetCatalog.get(name)[0]["annotations"][0]["segmentation"]) == 1
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"))
    assert len(evaluator._coco_api.anns[1]["segmentation"]) == 1


def test_registering_again(dataset, tmp_path):
    name = register(dataset, tmp_path)
    register(dataset, tmp_path)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(dataset))
    with pytest.raises(ValueError, match=f"'{name}' is registered already"):
        register_coco_dataset(name, str(other), str(tmp_path / "images"))


def test_missing_annotation_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        register_coco_dataset("test_set", str(tmp_path / "none.json"), str(tmp_path))


def test_missing_image_folder(dataset, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(dataset))
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere.*a\.json does not exist"):
        register_coco_dataset("test_set", str(tmp_path / "a.json"), str(tmp_path / "nowhere"))


NOT_A_DATASET = {
    "empty": ("", "is not a JSON file"),
    "Python in place of JSON": ("{'images': []}", "is not a JSON file"),
    "binary": ("\x00\x01", "is not a JSON file"),
    "nested too deep": ("[" * 100_000, "is not a JSON file.*recursion"),
    "a list": ("[]", "is not in COCO format"),
}


@table("text, message", NOT_A_DATASET)
def test_file_without_a_dataset_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"annotations\.json {message}"):
        register(text, tmp_path)


BOX = {"image_id": 1, "category_id": 7, "bbox": [5, 5, 15, 10]}
POINT = {"segmentation": [[5, 5, 5, 5, 5, 5]]}
LISTS = {"images": 1, "annotations": 11, "categories": 7}  # the id of the first record
NO_LIST = {"missing": MISSING, "a dict": {}, "a list of numbers": [1]}
NO_IDS = {"text": "11", "fraction": 1.5, "true": True, "huge": 10**400, "NaN": math.nan, "half a sign": "\ud800"}
BAD_DATASETS = {
    **{f"{x} {what}": ((x,), v, f" is not in COCO format.*'{x}'") for x in LISTS for what, v in NO_LIST.items()},
    **{f"id of {x} twice": ((x, 1, "id"), i, f": {x} with the same id: {i}") for x, i in LISTS.items()},
    **{f"id of {x} missing": ((x, 1, "id"), MISSING, f": {x} with an id that is not an integer") for x in LISTS},
    **{
        f"id of {x} {what}": ((x, 1, "id"), value, f": {x} with an id that is not an integer")
        for x in LISTS
        for what, value in NO_IDS.items()
        if (x, what) != ("images", "text")
    },
    "ids of images of two types": (("images", 1, "id"), "11", ": the ids of images are integers and strings"),
    "no images": (("images",), [], ": 'images' is empty"),
    "no categories": (("categories",), [], ": 'categories' is empty"),
    "category without name": (("categories", 0, "name"), MISSING, ": categories without a name: 7[.]"),
    **{
        f"{key} {value}": (("images", 1, key), value, ": images without file_name, height and width: 2[.]")
        for key, value in [("file_name", None), ("width", None), ("height", "30"), ("height", 0)]
    },
    "no annotations": (("annotations",), [], ": no annotation is usable"),
    "crowds only": (("annotations", slice(3)), MISSING, ": no annotation is usable"),
    "annotations without a pixel only": (("annotations",), [{**BOX, "id": 11, **POINT}], ": no annotation is usable"),
    "neither mask nor box": (("annotations", 2, "bbox"), MISSING, ".*with neither segmentation nor bbox; ids: 13[.]"),
    "more than five ids are counted": (
        ("annotations",),
        [{"id": i, **BOX, "bbox": [0, 0, -1, 0]} for i in range(1, 9)],
        r".*ids: 1, 2, 3, 4, 5, \.\.\. \(8 in all\)",
    ),
}


@table("path, value, message", BAD_DATASETS)
def test_bad_dataset_is_named(dataset, tmp_path, path, value, message):
    put(dataset, path, value)
    with pytest.raises(ValueError, match=rf"annotations\.json{message}"):
        register(dataset, tmp_path)


def png(size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, format="PNG")
    return file.getvalue()


BAD_IMAGES = {
    "missing": (None, FileNotFoundError, r"images that do not exist: .*2\.png"),
    "empty": (b"", ValueError, r"cannot be read as images: .*2\.png"),
    "of no format": (b"no image", ValueError, r"cannot be read as images: .*2\.png"),
    "broken off": (b"\x89PNG\r\n\x1a\n\x00\x00", ValueError, r"cannot be read as images: .*2\.png"),
    "of another size": (png((W, H + 1)), ValueError, rf"2\.png is {W}x{H + 1}, not {W}x{H}"),
}


@table("content, error, message", BAD_IMAGES)
def test_bad_image_is_named(dataset, tmp_path, content, error, message):
    path = tmp_path / "images" / "2.png"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(error, match=message):
        register(dataset, tmp_path)


SQUARE = encoded(rectangle(5, 5, 20, 20))


def counts(value):
    return {"size": [H, W], "counts": value}


BAD_VALUES = [
    ("image_id", "image_id is not among the images", {"of no image": 99, "a list": [1]}),
    ("category_id", "category_id is not among the categories", {"of no category": 1}),
    ("ignore", "'ignore'", {"set": 1}),
    ("iscrowd", "iscrowd is neither 0 nor 1", {"text": "yes", "2": 2}),
    ("difficult", "difficult is neither 0 nor 1", {"null": None}),
    ("area", "area is not a finite number", {"NaN": math.nan, "text": "150", "negative": -1}),
    ("keypoints", "keypoints are not a list of finite numbers", {"with text": ["x", 1, 2]}),
    ("bbox", "bbox is not four finite numbers", {"empty": [], "null": None, "of three": [1, 2, 3]}),
    ("bbox", "bbox is not four finite numbers", {"with NaN": [1, 2, 3, math.nan], "with text": [1, 2, 3, "4"]}),
    ("bbox", "bbox is not four finite numbers", {"infinite": [1, 2, 3, math.inf]}),
    ("bbox", "bbox has negative width or height", {"negative": [1, 2, 3, -4]}),
    ("bbox", "bbox lies outside the image", {"right of the image": [W, 2, 3, 4], "left of the image": [-5, 2, 5, 4]}),
    ("bbox", "bbox reaches more than 4 image sizes out", {"far out": [1, 2, 1e300, 4]}),
    ("segmentation", "neither polygons nor an RLE", {"text": "polygon", "without counts": {"size": [H, W]}}),
    ("segmentation", "fewer than three points or an odd number", {"of two points": [[1, 1, 5, 5]]}),
    ("segmentation", "fewer than three points or an odd number", {"of odd length": [[1, 1, 5, 5, 1, 9, 7]]}),
    ("segmentation", "polygon that is not a list of finite numbers", {"of bare numbers": [1, 1, 5, 5, 1, 9]}),
    ("segmentation", "polygon that is not a list of finite numbers", {"with NaN": [[1, 1, 5, 5, 1, math.nan]]}),
    ("segmentation", "polygon that is not a list of finite numbers", {"beyond floats": [[1, 1, 10**400, 5, 5, 9]]}),
    # pycocotools ends the process with SIGSEGV.
    ("segmentation", "polygon that reaches more than 4 image sizes out", {"far out": [[1, 1, 3e7, 5, 5, 9]]}),
    ("segmentation", "polygon that reaches more than 4 image sizes out", {"farther out": [[1, 1, 1e9, 5, 5, 9]]}),
    ("segmentation", "outline is hundreds of times as long", {"of long outline": [[0, 0, W, H] * 5000]}),
    ("segmentation", "RLE size is not", {"turned": {**SQUARE, "size": [W, H]}}),
    ("segmentation", "RLE size is not", {"of a fractional size": {"size": [float(H), W], "counts": [5, H * W - 5]}}),
    (
        "segmentation",
        "counts do not add up",
        {
            "cut off": counts(SQUARE["counts"][:-1]),
            "of empty counts": counts(""),
            "with a letter": counts(SQUARE["counts"] + "é"),
            "with half a sign": counts(SQUARE["counts"] + "\ud800"),
            "without an end": counts("o" * 20),
            "of too few runs": counts([5, 5]),
            "of a negative run": counts([5, -5, H * W]),
            "of runs whose sum wraps": counts([2**63 - 1, 2**63 - 1, 2 + H * W]),
            "of a huge run": counts([10**400]),
        },
    ),
]
BAD_ANNOTATIONS = {
    **{f"{key} {what}": ({key: x}, message) for key, message, values in BAD_VALUES for what, x in values.items()},
    "segmentation worse than the bbox": ({"bbox": [1, 2, 0, 4], "segmentation": [[1, 1, 5, 5]]}, "three points"),
}


@table("change, message", BAD_ANNOTATIONS)
def test_bad_annotation_is_named(dataset, tmp_path, change, message):
    dataset["annotations"][0].update(change)
    with pytest.raises(ValueError, match=rf"annotations\.json: annotations .*{message}.*; ids: 11"):
        register(dataset, tmp_path)
    assert "test_set" not in DatasetCatalog


NO_PIXEL = {
    "RLE empty": {"segmentation": encoded(rectangle(0, 0, 0, 0))},
    "runs of background": {"segmentation": counts([H * W])},
    "polygon of one point": POINT,
    "polygon between pixels": {"segmentation": [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]], "bbox": [5.1, 5.1, 0.1, 0.1]},
    "polygon out of the image": {"segmentation": [[W + 5, 5, W + 9, 5, W + 9, 9]]},
    "box without width": {"bbox": [1, 2, 0, 4]},
    "box without height": {"bbox": [1, 2, 3, 0]},
}


@table("change", NO_PIXEL)
def test_an_annotation_without_a_pixel_is_left_out_of_training_with_a_warning(dataset, tmp_path, caplog, change):
    dataset["annotations"][0].update(change)
    register(dataset, tmp_path)
    DatasetCatalog.get("test_set")
    record = DatasetCatalog.get("test_set")[0]
    mapper = MNCDatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True)
    assert mapper(record)["instances"].gt_classes.tolist() == [0]  # that of annotation 12
    (warning,) = [x.getMessage() for x in caplog.records if "no pixel" in x.getMessage()]
    assert "annotations.json: annotations that cover no pixel" in warning and "ids: 11." in warning


def test_outlines_of_many_points_are_no_problem():
    """One of a point for every pixel along it, in the corner where x and y differ most."""
    angles = np.linspace(0, 2 * np.pi, 20_000)
    outline = np.stack([3900 + 90 * np.cos(angles), 100 + 90 * np.sin(angles)], axis=1)
    assert find_mask_problem([outline.ravel().tolist()], 4000, 4000) is None


RUNS = {
    "short": ((7, 9), 0.5),
    "long of background": ((300, 400), 0.001),
    "long of foreground": ((300, 400), 0.999),
    "one pixel": ((1, 1), 1.0),
    "no foreground": ((50, 50), 0.0),
}


@table("shape, share", RUNS)
def test_run_lengths_agree_with_pycocotools(shape, share):
    mask = np.random.default_rng(0).random(shape) < share
    runs = run_lengths(encoded(mask)["counts"])
    values = np.arange(len(runs)) % 2 == 1
    np.testing.assert_array_equal(np.repeat(values, runs).reshape(shape, order="F"), mask)


@pytest.fixture
def count(dataset, tmp_path):
    """A function that counts classes by a config; "test_set", and "test_nameless" without classes, are registered."""
    register(dataset, tmp_path)
    DatasetCatalog.register("test_nameless", list)

    def count(train, test, number):
        cfg = get_cfg()
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.ROI_HEADS.NUM_CLASSES = train, test, number
        return num_classes_from_datasets(cfg)

    return count


NUMBERS = {
    "of the training set": (("test_set",), (), -1, 2),
    "of the test set": ((), ("test_set",), -1, 2),
    "given and right": (("test_set",), ("test_set",), 2, 2),
    "of two sets that agree": (("shapes_train",), ("shapes_val",), -1, 5),
    "given for a set without classes": (("test_nameless",), (), 3, 3),
}


@table("train, test, number, expected", NUMBERS)
def test_number_of_classes(count, train, test, number, expected):
    assert count(train, test, number) == expected


TWO_AND_FIVE = r"'test_set' and 'shapes_train'.*2 \(early, late\) and 5 \(disc"
WRONG_NUMBERS = {
    "other than the file's": (("test_set",), (), 80, r"NUM_CLASSES is 80, but .*annotations\.json has 2 classes"),
    "other than the shapes'": (("shapes_train",), (), 80, r"NUM_CLASSES is 80, but .*shapes_.*\.json has 5 classes"),
    "of two training sets": (("test_set", "shapes_train"), (), -1, TWO_AND_FIVE),
    "of a training and a test set": (("test_set",), ("shapes_train",), -1, TWO_AND_FIVE),
    "of a set that is not registered": (("no_such_set",), (), 3, "'no_such_set'.*--dataset no_such_set ANNOTATIONS"),
    "of a set without classes": (("test_nameless",), (), -1, r"test_nameless.*Set MODEL\.ROI_HEADS\.NUM_CLASSES"),
}


@table("train, test, number, message", WRONG_NUMBERS)
def test_number_of_classes_that_is_not_clear_is_named(count, train, test, number, message):
    with pytest.raises(ValueError, match=message):
        count(train, test, number)


REAL_SETS = {
    "one class in training": ("nuclei", "train", 207, 6555, 1),
    "one class in validation": ("nuclei", "val", 93, 2871, 1),
    "COCO's classes": ("coco_mini", "train", 294, 2518, 80),
    "VOC's classes": ("coco_mini", "val_voc20", 154, 885, 20),
}


@table("folder, file, images, instances, classes", REAL_SETS)
def test_real_sets(folder, file, images, instances, classes):
    root = SHARED / folder
    if not root.is_dir():
        pytest.skip(f"the real dataset {root} is not here")
    name = f"test_{folder}_{file}"
    register_coco_dataset(name, str(root / "annotations" / f"{file}.json"), str(root / "images"))
    records = DatasetCatalog.get(name)
    assert len(records) == images
    assert sum(len(record["annotations"]) for record in records) == instances
    assert len(MetadataCatalog.get(name).thing_classes) == classes
    assert MetadataCatalog.get(name).has_all_masks
    assert hasattr(MetadataCatalog.get(name), "json_file")
