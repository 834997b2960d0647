"""Trained models as files that run without this project: torch.export's and ONNX, with a client of the latter."""

from .network import CandidateNetwork
from .writer import FORMATS, WEIGHTS, export_model

__all__ = ["FORMATS", "WEIGHTS", "CandidateNetwork", "export_model"]
