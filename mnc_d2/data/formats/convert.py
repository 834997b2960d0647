"""From a file or folder in one of four formats to COCO JSON, checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util

from ...files import open_atomically
from ...messages import first_few
from ..coco_checks import check_coco_dataset, find_problem
from ..masks import to_rle
from .labelme import is_labelme, read_labelme
from .labels import LabelledDataset, LabelledImage
from .voc import FOLDERS as VOC_FOLDERS
from .voc import read_voc
from .yolo import find_yaml, read_yolo

__all__ = ["convert_dataset"]

WRITTEN_BY = "mnc_d2.data.formats"
FORMATS = (
    "COCO (a JSON file), YOLO (data.yaml), Pascal VOC (JPEGImages, SegmentationObject, SegmentationClass) or labelme "
    "(a JSON file for each image)"
)


def convert_dataset(
    path: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    subset: str | None = None,
) -> tuple[str, str]:
    """Find out in which format a dataset is, convert it to COCO JSON and check it.

    Images are neither copied nor changed. A dataset in COCO JSON is checked and returned as it is. Another one is
    written to ``output_dir`` as ``<subset>.json`` or ``annotations.json``, from anew in each call, in one step when
    nothing is wrong with it: an interrupted run leaves what was there.

    Args:
        path: a COCO JSON file, YOLO's data.yaml, or the folder of a dataset.
        output_dir: where the JSON file goes; made if need be.
        image_root: of COCO JSON, the folder to which file names are relative; None for a folder ``images`` beside the
            file or beside its folder, else the file's own folder. Not for other formats, which say where images are.
        subset: the part of the dataset, "train" for example: of YOLO's data.yaml, of VOC's ImageSets/Segmentation, or
            the name of one of a folder's COCO files. None for all of it.

    Returns:
        Paths of the annotations and of the folder of the images, for :func:`mnc_d2.data.register_coco_dataset` and
        ``train_net.py --dataset``.

    Raises:
        FileNotFoundError: something is not there.
        ValueError: the format is not known, or something is wrong; the message names the file and the line, or the id.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"The dataset {path} does not exist. Check the path.")
    is_yaml = path.is_file() and path.suffix in (".yaml", ".yml")
    if path.is_file() and not is_yaml and subset is not None:
        raise ValueError(f"{path} is one file, which has no subset {subset!r}. Leave out the subset.")
    coco_file = _find_coco_file(path, subset) if path.is_dir() else path
    if coco_file is not None and not is_yaml:
        root = str(image_root or _find_image_root(coco_file))
        check_coco_dataset(str(coco_file), root)
        return str(coco_file), root
    if image_root is not None:
        raise ValueError(f"The image folder {image_root} is given, but {path} is not in COCO format.")
    labels = read_yolo(path, subset) if is_yaml else _read_folder(path, subset)
    images = sorted(labels.images, key=lambda image: image.path.as_posix())
    problems = labels.problems + [problem for image in images for problem in _find_problems(image, labels.classes)]
    if problems:
        raise ValueError(f"{path} has {len(problems)} problems. {first_few(problems)}. Correct these files.")
    if not any(image.annotations for image in images):
        raise ValueError(f"{path} has no instance in {len(images)} images. Check the path.")
    root = os.path.commonpath([image.path.parent.absolute() for image in images])
    json_file = Path(output_dir, f"{subset or 'annotations'}.json")
    _write(json_file, _build_dataset(path, images, labels.classes, root))
    return str(json_file), root


def _read_folder(folder: Path, subset: str | None) -> LabelledDataset:
    if all((folder / name).is_dir() for name in VOC_FOLDERS):
        return read_voc(folder, subset)
    yaml_file = find_yaml(folder)
    if yaml_file is not None:
        return read_yolo(yaml_file, subset)
    if not any(map(is_labelme, folder.rglob("*.json"))):
        raise ValueError(f"{folder} is in none of these formats: {FORMATS}. See docs/data.md.")
    if subset is not None:
        raise ValueError(f"{folder} is in labelme's format, which has no subsets as '{subset}': name a folder.")
    return read_labelme(folder)


def _find_coco_file(folder: Path, subset: str | None) -> Path | None:
    """Return the COCO file of a folder, of the name ``subset`` if that is given; None if there is none."""
    places = [folder, folder / "annotations", *([folder / subset] if subset else [])]
    found = [path for place in places for path in sorted(place.glob("*.json")) if _is_coco(path)]
    if subset is not None:
        found = [path for path in found if subset in (path.stem, path.parent.name)] or found
    if len(found) > 1:
        names = first_few([path.relative_to(folder) for path in found])
        raise ValueError(f"{folder} has several COCO files: {names}. Name one of them.")
    return found[0] if found else None


def _is_coco(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "categories"} <= set(content)


def _find_image_root(json_file: Path) -> Path:
    candidates = (json_file.parent / "images", json_file.parent.parent / "images")
    return next((folder for folder in candidates if folder.is_dir()), json_file.parent)


def _find_problems(image: LabelledImage, classes: list[str]) -> list[str]:
    categories = dict(enumerate(classes, start=1))
    problems = []
    for annotation, place in zip(image.annotations, image.places):
        problem = find_problem({**annotation, "image_id": 0}, {0: image.size}, categories)
        if problem:
            problems.append(f"{place}: an annotation {problem}")
    return problems


def _build_dataset(source: Path, images: list[LabelledImage], classes: list[str], root: str) -> dict[str, Any]:
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        file_name = Path(os.path.relpath(image.path.absolute(), root)).as_posix()
        records.append({"id": image_id, "file_name": file_name, "height": image.size[0], "width": image.size[1]})
        for annotation in image.annotations:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, **annotation})
            annotations[-1].update(_measure(annotation, image.size))
    return {
        "info": {"description": f"converted from {source.name}", "written_by": WRITTEN_BY, "image_root": root},
        "images": records,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }


def _measure(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return bbox, that of the mask where there is one, and area."""
    if "segmentation" not in annotation:
        return {"area": annotation["bbox"][2] * annotation["bbox"][3]}
    rle = to_rle(annotation["segmentation"], *size)
    return {"bbox": mask_util.toBbox(rle).tolist(), "area": int(mask_util.area(rle))}


def _write(json_file: Path, dataset: dict[str, Any]) -> None:
    """Write the annotations over what an earlier conversion wrote, and over nothing else."""
    if json_file.exists():
        try:
            earlier = json.loads(json_file.read_text(encoding="utf-8"))["info"]["written_by"] == WRITTEN_BY
        except (ValueError, KeyError, TypeError):
            earlier = False
        if not earlier:
            raise ValueError(f"{json_file} is there, and not from an earlier conversion. Choose another folder.")
    json_file.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(json_file, "w", encoding="utf-8") as file:
        json.dump(dataset, file)
