"""Datasets and their mapper. Importing this package registers the shapes and PASCAL VOC; it reads no file."""

from detectron2.data import DatasetCatalog

from .coco import num_classes_from_datasets, register_coco_dataset
from .files import datasets_root, prepare_dataset
from .formats import DatasetSummary, convert_dataset, describe_dataset, split_dataset
from .images import ImageError, read_image
from .mapper import DATASET_MAPPER_REGISTRY, MNCDatasetMapper, build_mapper
from .resize import ResizeByExactScale, build_test_resize, exact_scale, scaled_size
from .shapes import SHAPES_CLASSES, SHAPES_SPLITS, ShapesSpec, prepare_shapes, register_shapes
from .voc import VOC_CLASSES, VOC_SETS, VOC_UNIONS, VOCSet, register_union, register_voc_set

__all__ = [
    "DATASET_MAPPER_REGISTRY",
    "DatasetSummary",
    "ImageError",
    "MNCDatasetMapper",
    "ResizeByExactScale",
    "SHAPES_CLASSES",
    "SHAPES_SPLITS",
    "ShapesSpec",
    "VOC_CLASSES",
    "VOC_SETS",
    "VOC_UNIONS",
    "VOCSet",
    "build_mapper",
    "build_test_resize",
    "convert_dataset",
    "describe_dataset",
    "exact_scale",
    "num_classes_from_datasets",
    "prepare_dataset",
    "prepare_shapes",
    "read_image",
    "register_coco_dataset",
    "register_shapes",
    "register_union",
    "register_voc_set",
    "scaled_size",
    "split_dataset",
]

# A reloaded module registers once.
for _name, _spec in SHAPES_SPLITS.items():
    if _name not in DatasetCatalog:
        register_shapes(_name, _spec)
for _name, _voc_set in VOC_SETS.items():
    if _name not in DatasetCatalog:
        register_voc_set(_name, _voc_set, datasets_root())
for _name, _parts in VOC_UNIONS.items():
    if _name not in DatasetCatalog:
        register_union(_name, _parts)
