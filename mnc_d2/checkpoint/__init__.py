from .catalog import TorchvisionHandler
from .checkpointer import MNCCheckpointer
from .description import CompleteCheckpointer, DescribeModel, ModelDescription, read_description, record_metrics

__all__ = [
    "CompleteCheckpointer",
    "DescribeModel",
    "MNCCheckpointer",
    "ModelDescription",
    "TorchvisionHandler",
    "read_description",
    "record_metrics",
]
