"""Multi-task Network Cascades (Dai, He, Sun, CVPR 2016) as a Detectron2 extension.

Importing this package registers its components in Detectron2's registries, its datasets in Detectron2's catalogs,
and "torchvision://" as a place of weights.
"""

import importlib.util
import warnings

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "mnc_d2 needs Detectron2, which is not installed: run `make install` in a clone of mnc_d2, or build it by "
        "`pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'`."
    )

with warnings.catch_warnings():
    # Detectron2 and fvcore script functions when they are imported, and a user can do nothing about it.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
    import detectron2.modeling  # noqa: F401

__version__ = "0.1.0"  # which what follows imports

from . import checkpoint, data, experiments, modeling  # noqa: E402, F401  (imported for their registrations)
from .config import add_mnc_config  # noqa: E402
from .predictor import load_predictor  # noqa: E402

__all__ = ["add_mnc_config", "load_predictor"]
