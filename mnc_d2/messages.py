"""What messages have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_few(items: Sequence[Any], limit: int = 5, separator: str = ", ") -> str:
    """Join the first items; where there are more than ``limit``, say how many in all."""
    shown = separator.join(str(item) for item in items[:limit])
    return shown + (f"{separator}... ({len(items)} in all)" if len(items) > limit else "")
