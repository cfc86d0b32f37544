from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.data.images import image_suffix, open_image, save_png, to_tensor
from mmalign.types import ImageRef, InputError

LIMIT = 1_000_000


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def opened(data: bytes, max_pixels: int = LIMIT) -> Image.Image:
    return open_image(ImageRef(data, "pairs.parquet row 7, jpg_0"), max_pixels=max_pixels)


def photo() -> Image.Image:
    from skimage import data

    return Image.fromarray(data.astronaut()).resize((64, 48))


def raw_png(
    width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b""
) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_allowed_formats_decode_to_rgb(format: str) -> None:
    image = opened(encode(photo(), format))
    assert (image.mode, image.size) == ("RGB", (64, 48))
    error = np.abs(np.asarray(image, float) - np.asarray(photo(), float)).mean()
    assert error < 15


@pytest.mark.parametrize("format", ["PPM", "TGA", "ICO", "PDF"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(InputError, match="row 7, jpg_0: not an image of an allowed format"):
        opened(encode(photo(), format))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(format: str, share: float) -> None:
    data = encode(photo(), format)
    with pytest.raises(InputError, match=r"row 7, jpg_0: .*(decoded|header|format)"):
        opened(data[: int(len(data) * share)])


def test_zero_bytes() -> None:
    with pytest.raises(InputError, match="row 7, jpg_0: the image is empty"):
        opened(b"")


def test_text_as_image(tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    file.write_text("<html>404 not found</html>")
    with pytest.raises(InputError, match=r"photo\.png: not an image of an allowed format"):
        open_image(ImageRef(file, str(file)), max_pixels=LIMIT)


def test_wrong_suffix_is_read_by_content(tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(encode(photo(), "JPEG"))
    ref = ImageRef(file, str(file))
    assert open_image(ref, max_pixels=LIMIT).size == (64, 48)
    assert image_suffix(ref, LIMIT) == ".jpg"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 3: the file does not exist"):
        open_image(ImageRef(tmp_path / "no.png", "row 3"), max_pixels=LIMIT)


@pytest.mark.timeout(10)
def test_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="row 3: not a regular file"):
        open_image(ImageRef(tmp_path / "pipe.png", "row 3"), max_pixels=LIMIT)


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_huge_image_is_refused_by_its_header(
    side: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    data = raw_png(side, side, 1, 0, b"\0" * 1000)

    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(InputError, match=r"row 7, jpg_0: the image has .*max_pixels 50000000"):
        opened(data, max_pixels=50_000_000)
    assert not recwarn.list


def test_max_pixels_is_inclusive() -> None:
    data = encode(Image.new("RGB", (10, 10)))
    assert opened(data, max_pixels=100).size == (10, 10)
    with pytest.raises(InputError, match="10 x 10 pixels, more than max_pixels 99"):
        opened(data, max_pixels=99)


def test_cmyk() -> None:
    image = opened(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert image.mode == "RGB"
    red, green, blue = image.getpixel((4, 4))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled(format: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    image = opened(encode(Image.fromarray(values), format))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_16_bit_color_is_scaled() -> None:
    pixel = struct.pack(">HHH", 0, 32768, 65535)
    assert opened(raw_png(1, 1, 16, 2, b"\0" + pixel)).getpixel((0, 0)) == (0, 128, 255)


def test_32_bit_is_refused() -> None:
    floats = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    with pytest.raises(InputError, match="32 bits per channel: convert it to 8 or 16 bits"):
        opened(encode(floats, "TIFF"))


def test_palette_with_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    decoded = opened(encode(image, transparency=0))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    clear, half = (0,) * len(mode), (*([0] * (len(mode) - 1)), 128)
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), half)
    decoded = opened(encode(image))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == (127, 127, 127)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame(format: str) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encode(first, format, save_all=True, append_images=[second])
    red, _, blue = opened(data).getpixel((4, 4))  # type: ignore[misc]
    assert red > 240
    assert blue < 15


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (20, 10), "blue")
    image.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    rotated = opened(encode(image, "JPEG", exif=exif, quality=95))
    assert rotated.size == (10, 20)
    assert rotated.getpixel((5, 2))[0] > 200  # type: ignore[index]
    assert rotated.getpixel((5, 17))[2] > 200  # type: ignore[index]


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_one_pixel(mode: str) -> None:
    image = opened(encode(Image.new(mode, (1, 1), 1 if mode == "1" else "white")))
    assert image.size == (1, 1)
    tensor = to_tensor(image, 16)
    assert tensor.shape == (3, 16, 16)
    assert tensor.min() == 1


def test_to_tensor_keeps_the_center() -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (10, 0, 30, 20))
    assert to_tensor(image, 20).min() == 1
    assert to_tensor(image, 10).shape == (3, 10, 10)
    assert to_tensor(image).shape == (3, 20, 40)


def test_to_tensor_of_a_strip_does_not_grow_it() -> None:
    assert to_tensor(Image.new("RGB", (1, 100_000)), 64).shape == (3, 64, 64)


def test_to_tensor_equals_resize_then_crop() -> None:
    picture = photo().resize((640, 480), Image.Resampling.BICUBIC)
    usual = picture.resize((128, 96), Image.Resampling.BILINEAR).crop((16, 0, 112, 96))
    difference = (to_tensor(picture, 96) - to_tensor(usual)).abs()
    assert difference[:, 2:-2, 2:-2].max() < 2 / 255


def test_save_png_round_trip(tmp_path: Path) -> None:
    tensor = torch.randint(0, 256, (3, 5, 7)).float() / 255
    save_png(tensor, tmp_path / "deep" / "a.png")
    ref = ImageRef(tmp_path / "deep" / "a.png", "a")
    assert torch.equal(to_tensor(open_image(ref, max_pixels=100)), tensor)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_save_png_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.png: the image has pixels that are not finite"):
        save_png(torch.full((3, 2, 2), float("nan")), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
