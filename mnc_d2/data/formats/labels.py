"""What the readers of all formats return, and what they have in common."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..images import IMAGE_SUFFIXES

__all__ = ["LabelledDataset", "LabelledImage", "find_images", "read_lines"]


@dataclass
class LabelledImage:
    """An image and its instances.

    Attributes:
        path: of the image file.
        size: (height, width) in pixels, as the image is read.
        annotations: in COCO's format, with category_id and segmentation, bbox or both; without ids.
        places: for each annotation the file, and the line or number in it, for messages.
    """

    path: Path
    size: tuple[int, int]
    annotations: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, place: str, **annotation: Any) -> None:
        """Add an annotation."""
        self.annotations.append(annotation)
        self.places.append(place)


@dataclass
class LabelledDataset:
    """What a reader found.

    Attributes:
        classes: names; category_id is the index + 1.
        images: in any order.
        problems: each a sentence without its stop that names the file, and the line where there are lines.
    """

    classes: list[str]
    images: list[LabelledImage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and those under it, by path."""
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, stripped, empty ones too.

    Raises:
        ValueError: it is not text; the message names it.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from error
