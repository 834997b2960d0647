"""Small folders in the form of VOC and SBD, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from mnc_d2.data.voc import VOC_CLASSES, voc_palette

VOID = 255


class Scene:
    """An image with rectangular objects, some hidden in part by those after them.

    Attributes:
        size: (height, width).
        objects: rows of class name, x0, y0, x1, y1, difficult, truncated; the pixels x0 <= x < x1 and so on.
        instance_map: uint8 (H, W), k + 1 where object k is visible.
    """

    def __init__(self, size, objects):
        self.size = size
        self.objects = objects
        self.instance_map = np.zeros(size, dtype=np.uint8)
        for k, (_, x0, y0, x1, y1, *_) in enumerate(objects):
            self.instance_map[y0:y1, x0:x1] = k + 1

    @property
    def categories(self):
        return [VOC_CLASSES.index(name) + 1 for name, *_ in self.objects]

    @property
    def class_map(self):
        lookup = np.array([0, *self.categories], dtype=np.uint8)
        return lookup[self.instance_map]

    def masks(self):
        """The objects' visible pixels: list of bool (H, W)."""
        return [self.instance_map == k + 1 for k in range(len(self.objects))]


def write_scene(folder: Path, name: str, scene: Scene, masks: bool = True) -> None:
    """Write the image, the XML file and, with a void border around each object, the two segmentations."""
    for sub in ("JPEGImages", "Annotations", "SegmentationObject", "SegmentationClass"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    height, width = scene.size
    pixels = np.random.default_rng(int(name.replace("_", ""))).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
    objects = "".join(
        f"<object><name>{cls}</name><truncated>{truncated}</truncated><difficult>{difficult}</difficult>"
        f"<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
        # Parts of people have names of their own.
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        "</object>"
        for cls, x0, y0, x1, y1, difficult, truncated in scene.objects
    )
    (folder / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"
    )
    if masks:
        border = void_border(scene.instance_map)
        for sub, index_map in (("SegmentationObject", scene.instance_map), ("SegmentationClass", scene.class_map)):
            image = Image.fromarray(np.where(border, VOID, index_map).astype(np.uint8), mode="P")
            image.putpalette(voc_palette().ravel().tolist())
            image.save(folder / sub / f"{name}.png")


def void_border(instance_map: np.ndarray) -> np.ndarray:
    """The pixels beside another instance or the background: bool (H, W)."""
    border = np.zeros(instance_map.shape, dtype=bool)
    border[:, 1:] |= instance_map[:, 1:] != instance_map[:, :-1]
    border[1:] |= instance_map[1:] != instance_map[:-1]
    return border


def write_list(path: Path, names) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def write_mat(sbd: Path, name: str, instance_map, class_map, categories, column: bool = True) -> None:
    """Write inst/ and cls/ as SBD has them: 1 x 1 structs; categories are a column, or a row."""
    for sub in ("inst", "cls"):
        (sbd / sub).mkdir(parents=True, exist_ok=True)
    categories = np.asarray(categories, dtype=np.uint8).reshape((-1, 1) if column else (1, -1))
    boundaries = np.empty((max(len(categories), 1), 1), dtype=object)
    boundaries[:, 0] = [np.zeros((2, 2)) for _ in boundaries]
    inst = {"Segmentation": instance_map, "Boundaries": boundaries, "Categories": categories}
    cls = {"Segmentation": class_map, "Boundaries": boundaries, "CategoriesPresent": np.unique(categories)}
    savemat(sbd / "inst" / f"{name}.mat", {"GTinst": inst}, do_compression=True)
    savemat(sbd / "cls" / f"{name}.mat", {"GTcls": cls}, do_compression=True)


SCENES = {
    "2008_000001": Scene((40, 60), [("dog", 2, 3, 30, 33, 1, 0), ("dog", 5, 5, 34, 35, 0, 1)]),
    "2008_000002": Scene((50, 30), [("person", 1, 1, 12, 40, 0, 0), ("chair", 10, 20, 28, 48, 1, 1)]),
    "2008_000003": Scene((32, 32), [("aeroplane", 4, 4, 28, 20, 0, 0)]),
    "2009_000004": Scene((45, 45), [("tvmonitor", 0, 0, 45, 45, 0, 1), ("cat", 10, 10, 30, 30, 0, 0)]),
    "2009_000005": Scene((36, 48), [("bus", 20, 2, 44, 30, 1, 0)]),
}
TRAIN = ("2008_000001", "2008_000002", "2008_000003")  # the last one is not in SBD
VAL = ("2009_000004", "2009_000005")


def write_voc2012(root: Path) -> None:
    folder = root / "VOC2012"
    for name, scene in SCENES.items():
        write_scene(folder, name, scene)
    for task in ("Main", "Segmentation"):
        write_list(folder / "ImageSets" / task / "train.txt", TRAIN)
        write_list(folder / "ImageSets" / task / "val.txt", VAL)


def write_sbd(root: Path) -> None:
    """Write SBD for all images but one; its lists mix those of VOC."""
    sbd = root / "SBD" / "dataset"
    names = [name for name in SCENES if name != TRAIN[-1]]
    for i, name in enumerate(names):
        scene = SCENES[name]
        write_mat(sbd, name, scene.instance_map, scene.class_map, scene.categories, column=i % 2 == 0)
    write_list(sbd / "train.txt", [TRAIN[0], VAL[0]])
    write_list(sbd / "val.txt", [TRAIN[1], VAL[1]])
