"""What tests of more than one folder share."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.modeling import build_model
from devices import make_tensors_on
from PIL import Image
from programs import restored_catalogs
from small_backbone import build_small_fpn_backbone

from mnc_d2.checkpoint import ModelDescription
from mnc_d2.model_zoo import get_config

# The tensors of the tests are small: threads save little, and on a busy machine they cost many times more.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
DEVICE = "cpu"


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests/layers and tests/modeling have their tensors")


def pytest_configure(config):
    global DEVICE
    DEVICE = config.getoption("--device")
    if DEVICE != "cpu":
        make_tensors_on(DEVICE)


# Begun with: long ones at the end would leave the other processes of make test without work.
LONG_FILES = ["test_tutorial.py", "test_distributed.py", "test_export.py", "test_meta_arch.py", "test_train_net.py"]
LONG_FILES += ["test_resume.py", "test_roi_warp_runtime.py", "test_compare.py", "test_voc.py", "test_timm_backbone.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))
    for item in items:
        if DEVICE != "cpu" and item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason="about the CPU"))


@pytest.fixture(scope="session")
def device():
    """Where the tensors are that tests make."""
    return DEVICE


CLASSES = ("disc", "square")
COLOURS = ((230, 60, 40), (50, 90, 220))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """A cache of files for the tests, also of the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def clean_catalogs():
    """Forget the datasets that a test registers."""
    with restored_catalogs():
        yield


def shrink(name="quickstart/mnc_R_18_FPN.yaml", **overrides):
    """Return a quickstart config shrunk to what tests can afford, not frozen.

    Its backbone is known in the processes of the tests, so a program that is started needs another.
    """
    cfg = get_config(name)
    if cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone":
        cfg.MODEL.BACKBONE.NAME = build_small_fpn_backbone.__name__
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", DEVICE),
            *("MODEL.FPN.OUT_CHANNELS", 32),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 32),
            *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
            *("MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
            *("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES)),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 30),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", 20),
            *("INPUT.MIN_SIZE_TEST", 64),
            *("TEST.AUG.MIN_SIZES", (64, 96)),
            *("VIS_PERIOD", 0),
            *(item for pair in overrides.items() for item in pair),
        ]
    )
    return cfg


@pytest.fixture(scope="session")
def small_config():
    """The function :func:`shrink`."""
    return shrink


def draw_instances(size, instances):
    """Draw discs and squares; return the image, uint8 (size, size, 3), and the masks, bool (G, size, size).

    Args:
        size: side of the image in pixels.
        instances: rows of class, centre x, centre y, radius.
    """
    y, x = np.mgrid[:size, :size] + 0.5
    image = np.full((size, size, 3), 128, dtype=np.uint8)
    masks = []
    for cls, cx, cy, radius in instances:
        distance = np.hypot(x - cx, y - cy) if cls == 0 else np.maximum(abs(x - cx), abs(y - cy))
        masks.append(distance <= radius)
        image[masks[-1]] = COLOURS[cls]
    return image, np.array(masks)


# Two images of 96 x 96 with instances of both classes that do not overlap: (class, centre x, centre y, radius).
SCENES = [
    [(0, 24.0, 26.0, 16.0), (1, 68.0, 30.0, 18.0), (0, 62.0, 74.0, 14.0)],
    [(1, 26.0, 66.0, 15.0), (0, 66.0, 60.0, 20.0), (1, 64.0, 18.0, 12.0), (0, 22.0, 22.0, 12.0)],
]


@pytest.fixture(scope="session")
def coco_dataset(tmp_path_factory):
    """Two drawn images in COCO format: (path of the annotations, folder of the images)."""
    root = tmp_path_factory.mktemp("drawn")
    images, annotations = [], []
    for i, scene in enumerate(SCENES, start=1):
        image, masks = draw_instances(96, scene)
        Image.fromarray(image).save(root / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 96, "width": 96})
        for (cls, *_), mask in zip(scene, masks):
            rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": cls + 1,
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    path = root / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path, root


@pytest.fixture(scope="session")
def model_file(small_config, tmp_path_factory):
    """A model in one file, as a training writes it: an untrained one of discs and squares, ids 1 and 2.

    It finds something everywhere.
    """
    torch.manual_seed(0)
    cfg = small_config(**{"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone", "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0})
    description = ModelDescription(cfg.dump(), ["disc", "square"], [], [1, 2], "drawn", "0", {"segm/AP": 12.5})
    path = tmp_path_factory.mktemp("model") / "model_final.pth"
    torch.save({"model": build_model(cfg).state_dict(), "description": asdict(description)}, path)
    return path
