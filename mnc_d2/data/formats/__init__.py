"""Datasets in the formats that people have, to COCO JSON: see docs/data.md."""

from .convert import convert_dataset
from .summary import DatasetSummary, describe_dataset, split_dataset

__all__ = ["DatasetSummary", "convert_dataset", "describe_dataset", "split_dataset"]
