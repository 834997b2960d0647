"""What predictions are made on: images, folders of them, videos."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..data.images import IMAGE_SUFFIXES

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def is_video(path: str) -> bool:
    """Return whether a file is a video, by its name."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def list_inputs(inputs: Sequence[str], output: str) -> dict[str, str]:
    """Return the path of the picture of each image, or of the mp4 of each video, by the path of the original.

    Args:
        inputs: images, videos, and folders: what is in a folder, by name, takes its place.
        output: the folder of the pictures.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has neither images nor videos.
        ValueError: two pictures would have the same name, or one would overwrite an original.
    """
    paths = []
    for path in inputs:
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES))
            if not names:
                raise FileNotFoundError(f"The folder {path} has no image ({', '.join(IMAGE_SUFFIXES)}) and no video.")
            paths += [os.path.join(path, name) for name in names]
        elif os.path.isfile(path):
            paths.append(path)
        else:
            raise FileNotFoundError(f"The image, video or folder {path} does not exist.")
    by_picture: dict[str, str] = {}
    originals = {os.path.realpath(path) for path in paths}
    for path in paths:
        stem = os.path.splitext(os.path.basename(path))[0]
        picture = os.path.join(output, stem + (".mp4" if is_video(path) else ".png"))
        other = by_picture.setdefault(picture, path)
        if other != path:
            raise ValueError(f"The pictures of {other} and {path} would have the same name. Run them one by one.")
        if os.path.realpath(picture) in originals:
            raise ValueError(f"The picture {picture} would overwrite an image. Choose another folder for the pictures.")
    return {path: picture for picture, path in by_picture.items()}
