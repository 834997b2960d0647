from .catalog import TorchvisionHandler
from .checkpointer import MNCCheckpointer

__all__ = ["MNCCheckpointer", "TorchvisionHandler"]
