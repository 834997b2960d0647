"""The reader of images: the same picture whatever the file holds, and a name for what it refuses."""

import json
import struct
import zlib

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from mnc_d2.data import MNCDatasetMapper, register_coco_dataset
from mnc_d2.data.images import ImageError, read_image, read_image_size

H, W = 20, 30
PIXELS = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["bmp", "png", "ppm", "tif", "webp"])
def test_formats_without_loss_give_their_pixels(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(PIXELS).save(path, lossless=True)
    np.testing.assert_array_equal(read_image(path), PIXELS)
    np.testing.assert_array_equal(read_image(path, "BGR"), PIXELS[:, :, ::-1])


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_the_size_and_once_to_the_pixels(tmp_path, suffix, orientation):
    path = tmp_path / f"image.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = np.broadcast_to(np.linspace(0, 255, W).astype(np.uint8)[:, None], (H, W, 3)).copy()
    smooth[: H // 2] //= 2
    Image.fromarray(smooth).save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    expected = {1: smooth, 2: smooth[:, ::-1], 3: smooth[::-1, ::-1], 4: smooth[::-1]}.get(orientation)
    if expected is None:
        turned = smooth.transpose(1, 0, 2)
        flips = {5: turned, 6: turned[:, ::-1], 7: turned[::-1, ::-1], 8: turned[::-1]}
        expected = flips[orientation]
    actual = read_image(path)
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected).max() <= 6  # what JPEG loses
    assert read_image_size(path) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(np.uint16, 0, 4095), (np.uint16, 300, 65535), (np.int32, -7, 10**6), (np.float32, 0, 1)]
)
def test_deep_grey_images_are_scaled_from_their_smallest_to_their_largest_value(tmp_path, dtype, low, high):
    values = np.linspace(low, high, H * W).astype(dtype).reshape(H, W)
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path)
    expected = np.linspace(0, 255, H * W).reshape(H, W)
    actual = read_image(path)
    assert np.abs(actual - expected[:, :, None]).max() <= 0.6  # rounding, of the values too
    assert (actual == actual[:, :, :1]).all()


def test_16_bit_png_and_a_constant_image(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(H * W, dtype=np.uint16).reshape(H, W)).save(path)
    assert read_image(path).max() == 255
    Image.fromarray(np.full((H, W), 9999, dtype=np.uint16)).save(path)
    assert not read_image(path).any()


def test_palette_with_transparency_keeps_its_colours(tmp_path):
    image = Image.fromarray(PIXELS).quantize(16)
    image.save(tmp_path / "palette.png", transparency=bytes(range(16)))
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), np.asarray(image.convert("RGB")))


def test_cmyk_and_transparency(tmp_path):
    Image.new("CMYK", (W, H), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - [255, 0, 0]).max() <= 3
    Image.fromarray(np.dstack([PIXELS, np.zeros((H, W), np.uint8)])).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png"), PIXELS)


@pytest.mark.parametrize("name", ["turned.jpg", "deep.png"])
def test_check_and_training_see_the_same(tmp_path, clean_catalogs, name):
    path = tmp_path / name
    if name == "turned.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(PIXELS).save(path, exif=exif)
    else:
        Image.fromarray(np.arange(H * W, dtype=np.uint16).reshape(H, W)).save(path)
    width, height = read_image_size(path)
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}]
    images = [{"id": 1, "file_name": name, "height": height, "width": width}]
    dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(dataset))
    register_coco_dataset("one", tmp_path / "a.json", tmp_path)
    record = DatasetCatalog.get("one")[0]
    expected = read_image(path, "BGR")
    mapped = MNCDatasetMapper(False, augmentations=[], image_format="BGR")(record)["image"]
    np.testing.assert_array_equal(mapped.permute(1, 2, 0).numpy(), expected)


def several(path):
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def bomb(path):
    """A PNG whose header claims 60000 x 60000 pixels."""
    Image.fromarray(PIXELS).save(path)
    data = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


REFUSED = {
    "animated PNG": ("a.png", several, "holds several images"),
    "animated WebP": ("a.webp", several, "holds several images"),
    "stack of slices": ("a.tif", several, "holds several images"),
    "GIF": ("a.gif", lambda path: Image.fromarray(PIXELS).save(path), "cannot be read .it is none of"),
    "EPS under another name": (
        "a.png",
        lambda path: Image.fromarray(PIXELS).save(path, "EPS"),
        "cannot be read .it is none of",
    ),
    "Lab": ("a.tif", lambda path: Image.new("LAB", (W, H)).save(path), "colour space LAB"),
    "bomb": ("a.png", bomb, "decompression bomb"),
    "empty": ("a.png", lambda path: path.write_bytes(b""), "cannot be read .it is none of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named_by_its_header_and_by_its_pixels(tmp_path, case):
    name, write, message = REFUSED[case]
    write(tmp_path / name)
    for read in (read_image, read_image_size):
        with pytest.raises(ImageError, match=rf"Image .*/{name} .*{message}"):
            read(tmp_path / name)


def test_values_that_are_not_finite_are_refused(tmp_path):
    Image.fromarray(np.full((H, W), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ImageError, match=r"nan\.tif cannot be read \(it has values that are not finite\)"):
        read_image(tmp_path / "nan.tif")


DAMAGES = {
    "cut JPEG": ("a.jpg", lambda data: data[:-200], r"\(.*truncated"),
    "cut PNG": ("a.png", lambda data: data[: len(data) // 2], ""),
    "PNG of a damaged header": ("a.png", lambda data: data[:20] + bytes(255 - x for x in data[20:30]) + data[30:], ""),
}


@pytest.mark.parametrize("name, damage, message", list(DAMAGES.values()), ids=list(DAMAGES))
def test_damaged_images_are_refused(tmp_path, name, damage, message):
    path = tmp_path / name
    Image.fromarray(PIXELS).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ImageError, match=rf"{name} cannot be read {message}"):
        read_image(path)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"none\.png cannot be read"):
        read_image(tmp_path / "none.png")
