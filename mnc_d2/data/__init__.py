"""Datasets and their mapper. Importing this package registers `shapes_train` and `shapes_val`."""

from detectron2.data import DatasetCatalog

from .coco import num_classes_from_datasets, register_coco_dataset
from .mapper import MNCDatasetMapper
from .mask_proposals import mask_proposals_path, save_mask_proposals
from .resize import ResizeByExactScale, build_test_resize, exact_scale, scaled_size
from .shapes import SHAPES_CLASSES, SHAPES_SPLITS, ShapesSpec, prepare_dataset, prepare_shapes, register_shapes

__all__ = [
    "MNCDatasetMapper",
    "ResizeByExactScale",
    "SHAPES_CLASSES",
    "SHAPES_SPLITS",
    "ShapesSpec",
    "build_test_resize",
    "exact_scale",
    "mask_proposals_path",
    "num_classes_from_datasets",
    "prepare_dataset",
    "prepare_shapes",
    "register_coco_dataset",
    "register_shapes",
    "save_mask_proposals",
    "scaled_size",
]

for _name, _spec in SHAPES_SPLITS.items():
    if _name not in DatasetCatalog:  # a reloaded module registers once
        register_shapes(_name, _spec)
