"""Registration of COCO-format datasets: what is accepted, and what each bad file is told."""

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
    common = {"iscrowd": 0, "area": 150}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in (1, 2, 3)],
        "categories": [{"id": 7, "name": "late"}, {"id": 3, "name": "early"}],
        "annotations": [
            {"id": 11, "image_id": 1, "category_id": 7, "bbox": [5, 5, 15, 10], "segmentation": polygon, **common},
            {
                "id": 12,
                "image_id": 1,
                "category_id": 3,
                "bbox": [1, 2, 9, 8],
                "segmentation": encoded(rectangle(1, 2, 10, 10)),
                **common,
            },
            {"id": 13, "image_id": 2, "category_id": 3, "bbox": [0, 0, 9, 8], "segmentation": [], **common},
            {
                "id": 14,
                "image_id": 2,
                "category_id": 3,
                "bbox": [0, 0, W, H],
                "segmentation": {"size": [H, W], "counts": [0, H * W]},
                "iscrowd": 1,
                "area": H * W,
            },
        ],
    }


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


def test_rotated_image_is_measured_as_it_is_read(dataset, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (H, W)).save(tmp_path / "images" / "turned.jpg", exif=exif)
    dataset["images"].append({"id": 4, "file_name": "turned.jpg", "height": H, "width": W})
    register(dataset, tmp_path)


def test_missing_annotation_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        register_coco_dataset("test_set", str(tmp_path / "none.json"), str(tmp_path))


def test_missing_image_folder(dataset, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(dataset))
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere.*a\.json does not exist"):
        register_coco_dataset("test_set", str(tmp_path / "a.json"), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("text", ["", "{'images': []}", "\x00\x01"])
def test_not_json(tmp_path, text):
    with pytest.raises(ValueError, match=r"annotations\.json is not a JSON file"):
        register(text, tmp_path)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}, [1]])
def test_not_coco(dataset, tmp_path, key, value):
    if value is None:
        del dataset[key]
    else:
        dataset[key] = value
    with pytest.raises(ValueError, match=rf"annotations\.json is not in COCO format.*'{key}'"):
        register(dataset, tmp_path)


def test_nesting_that_is_too_deep_is_not_json(tmp_path):
    with pytest.raises(ValueError, match=r"annotations\.json is not a JSON file.*recursion"):
        register("[" * 100_000, tmp_path)


@pytest.mark.parametrize("change", ["none", "crowds"])
def test_no_usable_annotation(dataset, tmp_path, change):
    dataset["annotations"] = dataset["annotations"][3:] if change == "crowds" else []
    with pytest.raises(ValueError, match=r"annotations\.json: no annotation is usable"):
        register(dataset, tmp_path)


def test_list_is_not_coco(tmp_path):
    with pytest.raises(ValueError, match=r"annotations\.json is not in COCO format"):
        register("[]", tmp_path)


@pytest.mark.parametrize("key, i", [("images", 1), ("annotations", 11), ("categories", 7)])
def test_duplicate_ids(dataset, tmp_path, key, i):
    dataset[key][1]["id"] = i
    with pytest.raises(ValueError, match=rf"annotations\.json: {key} with the same id: {i}"):
        register(dataset, tmp_path)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_ids(dataset, tmp_path, key):
    del dataset[key][1]["id"]
    with pytest.raises(ValueError, match=f"{key} with an id that is not an integer"):
        register(dataset, tmp_path)


@pytest.mark.parametrize("value", ["11", 1.5, True, 10**400, math.nan, "\ud800"])
@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_ids_that_are_no_integers(dataset, tmp_path, key, value):
    dataset[key][1]["id"] = value
    with pytest.raises(ValueError, match=rf"{key} (with an id that is not an integer|are integers and strings)"):
        register(dataset, tmp_path)


@pytest.mark.parametrize("key", ["images", "categories"])
def test_empty_lists(dataset, tmp_path, key):
    dataset["annotations"] = []
    dataset[key] = []
    with pytest.raises(ValueError, match=f"'{key}' is empty"):
        register(dataset, tmp_path)


@pytest.mark.parametrize("key, value", [("file_name", None), ("width", None), ("height", "30"), ("height", 0)])
def test_incomplete_image_record(dataset, tmp_path, key, value):
    dataset["images"][1][key] = value
    with pytest.raises(ValueError, match="images without file_name, height and width: 2[.]"):
        register(dataset, tmp_path)


def test_missing_image(dataset, tmp_path):
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"images that do not exist: .*2\.png"):
        register(dataset, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_unreadable_image(dataset, tmp_path, content):
    (tmp_path / "images" / "2.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as images: .*2\.png"):
        register(dataset, tmp_path)


def test_image_of_another_size(dataset, tmp_path):
    Image.new("RGB", (W, H + 1)).save(tmp_path / "images" / "2.png")
    with pytest.raises(ValueError, match=rf"2\.png is {W}x{H + 1}, not {W}x{H}"):
        register(dataset, tmp_path)


def test_category_without_name(dataset, tmp_path):
    del dataset["categories"][0]["name"]
    with pytest.raises(ValueError, match="categories without a name: 7[.]"):
        register(dataset, tmp_path)


def corrupted(rle, edit):
    return {**rle, "counts": edit(rle["counts"])}


SQUARE = encoded(rectangle(5, 5, 20, 20))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": 99}, "image_id is not among the images"),
        ({"image_id": [1]}, "image_id is not among the images"),
        ({"category_id": 1}, "category_id is not among the categories"),
        ({"ignore": 1}, "'ignore'"),
        ({"bbox": []}, "bbox is not four finite numbers"),
        ({"bbox": None}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, math.nan]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, math.inf]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, "4"]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, -4]}, "bbox has negative width or height"),
        ({"bbox": [1, 2, 0, 4], "segmentation": [[1, 1, 5, 5]]}, "fewer than three points"),
        ({"bbox": [W, 2, 3, 4]}, "bbox lies outside the image"),
        ({"bbox": [-5, 2, 5, 4]}, "bbox lies outside the image"),
        ({"segmentation": [[1, 1, 5, 5]]}, "fewer than three points or an odd number"),
        ({"segmentation": [[1, 1, 5, 5, 1, 9, 7]]}, "fewer than three points or an odd number"),
        ({"segmentation": [1, 1, 5, 5, 1, 9]}, "polygon that is not a list of finite numbers"),
        ({"segmentation": [[1, 1, 5, 5, 1, math.nan]]}, "polygon that is not a list of finite numbers"),
        ({"segmentation": "polygon"}, "neither polygons nor an RLE"),
        ({"segmentation": {"size": [H, W]}}, "neither polygons nor an RLE"),
        ({"segmentation": {**SQUARE, "size": [W, H]}}, "RLE size is not"),
        ({"segmentation": corrupted(SQUARE, lambda counts: counts[:-1])}, "counts do not add up"),
        ({"segmentation": corrupted(SQUARE, lambda counts: "")}, "counts do not add up"),
        ({"segmentation": corrupted(SQUARE, lambda counts: counts + "é")}, "counts do not add up"),
        ({"segmentation": corrupted(SQUARE, lambda counts: "o" * 20)}, "counts do not add up"),
        ({"segmentation": {"size": [H, W], "counts": [5, 5]}}, "counts do not add up"),
        ({"segmentation": {"size": [H, W], "counts": [5, -5, H * W]}}, "counts do not add up"),
        # pycocotools ends the process with SIGSEGV.
        ({"segmentation": [[1, 1, 3e7, 5, 5, 9]]}, "polygon that reaches more than 4 image sizes out"),
        ({"segmentation": [[1, 1, 1e9, 5, 5, 9]]}, "polygon that reaches more than 4 image sizes out"),
        ({"segmentation": [[1, 1, 10**400, 5, 5, 9]]}, "polygon that is not a list of finite numbers"),
        ({"segmentation": [[0, 0, W, H] * 5000]}, "outline is hundreds of times as long"),
        ({"segmentation": {"size": [float(H), W], "counts": [5, H * W - 5]}}, "RLE size is not"),
        ({"segmentation": {"size": [H, W], "counts": [2**63 - 1, 2**63 - 1, 2 + H * W]}}, "counts do not add up"),
        ({"segmentation": {"size": [H, W], "counts": [10**400]}}, "counts do not add up"),
        ({"segmentation": corrupted(SQUARE, lambda counts: counts + "\ud800")}, "counts do not add up"),
        ({"bbox": [1, 2, 1e300, 4]}, "bbox reaches more than 4 image sizes out"),
        ({"iscrowd": "yes"}, "iscrowd is neither 0 nor 1"),
        ({"iscrowd": 2}, "iscrowd is neither 0 nor 1"),
        ({"difficult": None}, "difficult is neither 0 nor 1"),
        ({"area": math.nan}, "area is not a finite number"),
        ({"area": "150"}, "area is not a finite number"),
        ({"area": -1}, "area is not a finite number"),
        ({"keypoints": ["x", 1, 2]}, "keypoints are not a list of finite numbers"),
    ],
)
def test_bad_annotation_is_named(dataset, tmp_path, change, message):
    dataset["annotations"][0].update(change)
    with pytest.raises(ValueError, match=rf"annotations\.json: annotations .*{message}.*; ids: 11"):
        register(dataset, tmp_path)
    assert "test_set" not in DatasetCatalog


@pytest.mark.parametrize(
    "change",
    [
        {"segmentation": encoded(rectangle(0, 0, 0, 0))},
        {"segmentation": {"size": [H, W], "counts": [H * W]}},
        {"segmentation": [[5, 5, 5, 5, 5, 5]]},
        {"segmentation": [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]], "bbox": [5.1, 5.1, 0.1, 0.1]},
        {"segmentation": [[W + 5, 5, W + 9, 5, W + 9, 9]]},
        {"bbox": [1, 2, 0, 4]},
        {"bbox": [1, 2, 3, 0]},
    ],
)
def test_an_annotation_without_a_pixel_is_left_out_of_training_with_a_warning(dataset, tmp_path, caplog, change):
    dataset["annotations"][0].update(change)
    register(dataset, tmp_path)
    DatasetCatalog.get("test_set")
    record = DatasetCatalog.get("test_set")[0]
    mapper = MNCDatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True)
    assert mapper(record)["instances"].gt_classes.tolist() == [0]  # that of annotation 12
    (warning,) = [x.getMessage() for x in caplog.records if "no pixel" in x.getMessage()]
    assert "annotations.json: annotations that cover no pixel" in warning and "ids: 11." in warning


def test_annotations_without_a_pixel_alone_are_no_dataset(dataset, tmp_path):
    dataset["annotations"] = [{**dataset["annotations"][0], "segmentation": [[5, 5, 5, 5, 5, 5]]}]
    with pytest.raises(ValueError, match="no annotation is usable"):
        register(dataset, tmp_path)


def test_outlines_of_many_points_are_no_problem():
    """One of a point for every pixel along it, in the corner where x and y differ most."""
    angles = np.linspace(0, 2 * np.pi, 20_000)
    outline = np.stack([3900 + 90 * np.cos(angles), 100 + 90 * np.sin(angles)], axis=1)
    assert find_mask_problem([outline.ravel().tolist()], 4000, 4000) is None


def test_instance_with_neither_mask_nor_box(dataset, tmp_path):
    del dataset["annotations"][2]["bbox"]
    with pytest.raises(ValueError, match="with neither segmentation nor bbox; ids: 13[.]"):
        register(dataset, tmp_path)


def test_at_most_five_ids_are_listed(dataset, tmp_path):
    template = {**dataset["annotations"][0], "bbox": [0, 0, -1, 0]}
    dataset["annotations"] = [{**template, "id": i} for i in range(1, 9)]
    with pytest.raises(ValueError, match=r"ids: 1, 2, 3, 4, 5, \.\.\. \(8 in all\)"):
        register(dataset, tmp_path)


def test_run_lengths_agree_with_pycocotools():
    rng = np.random.default_rng(0)
    for shape, share in [((7, 9), 0.5), ((300, 400), 0.001), ((300, 400), 0.999), ((1, 1), 1.0), ((50, 50), 0.0)]:
        mask = rng.random(shape) < share
        runs = run_lengths(encoded(mask)["counts"])
        values = np.arange(len(runs)) % 2 == 1
        np.testing.assert_array_equal(np.repeat(values, runs).reshape(shape, order="F"), mask)


def config(train, test=(), number=-1):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = number
    return cfg


def test_number_of_classes_from_the_dataset(dataset, tmp_path):
    name = register(dataset, tmp_path)
    assert num_classes_from_datasets(config((name,))) == 2
    assert num_classes_from_datasets(config((), (name,))) == 2
    assert num_classes_from_datasets(config((name,), (name,), number=2)) == 2
    assert num_classes_from_datasets(config(("shapes_train",), ("shapes_val",))) == 5


def test_number_of_classes_that_differs_names_both_and_the_file(dataset, tmp_path):
    name = register(dataset, tmp_path)
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 80, but .*annotations\.json has 2 classes"):
        num_classes_from_datasets(config((name,), number=80))


def test_wrong_number_of_classes_names_the_file_of_the_shapes():
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 80, but .*shapes_.*annotations\.json has 5 classes"):
        num_classes_from_datasets(config(("shapes_train",), number=80))


def test_datasets_that_differ_in_their_classes(dataset, tmp_path):
    name = register(dataset, tmp_path)
    for train, test in [((name, "shapes_train"), ()), ((name,), ("shapes_train",))]:
        with pytest.raises(ValueError, match=rf"'{name}' and 'shapes_train'.*2 \(early, late\) and 5 \(disc"):
            num_classes_from_datasets(config(train, test))


def test_unregistered_dataset():
    with pytest.raises(ValueError, match="'no_such_set'.*--dataset no_such_set ANNOTATIONS"):
        num_classes_from_datasets(config(("no_such_set",), number=3))


def test_dataset_without_classes():
    DatasetCatalog.register("test_nameless", list)
    assert num_classes_from_datasets(config(("test_nameless",), number=3)) == 3
    with pytest.raises(ValueError, match=r"test_nameless.*Set MODEL\.ROI_HEADS\.NUM_CLASSES"):
        num_classes_from_datasets(config(("test_nameless",)))


@pytest.mark.parametrize(
    "folder, file, images, instances, classes",
    [
        ("nuclei", "train", 207, 6555, 1),
        ("nuclei", "val", 93, 2871, 1),
        ("coco_mini", "train", 294, 2518, 80),
        ("coco_mini", "val_voc20", 154, 885, 20),
    ],
)
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
