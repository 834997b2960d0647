"""The small parts of a model that tests/modeling has, here too."""

from modeling.conftest import (  # noqa: F401  (fixtures)
    make_map,
    make_proposals,
    make_roi_heads,
    make_target,
    random_boxes,
    storage,
)
