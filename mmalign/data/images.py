"""Images of strangers, decoded carefully to plain RGB, and images of ours, saved."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError

from mmalign.data.files import atomic_path
from mmalign.data.schema import HASH_BYTES, RowError
from mmalign.types import ImageRef, InputError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def open_image(ref: ImageRef, *, max_pixels: int) -> Image.Image:
    """Decode an image to RGB, 8 bits per channel.

    The size is read from the header, so nothing large is decoded to find out that it is. Of an
    animation or a file of several pages the first frame counts. EXIF rotation is applied, 16-bit
    gray is scaled so that 65535 becomes 255, transparency is laid over white, and CMYK is converted
    without its color profile.

    Args:
        ref: file or encoded bytes: JPEG, PNG, WEBP, BMP, GIF or TIFF, whatever the name says.
        max_pixels: largest width x height.

    Raises:
        InputError: naming `ref.where`, if it is missing, empty, truncated, of another format, too
            large, or of 32 bits per channel, whose range is unknown.
    """
    try:
        return decode(ref, max_pixels)
    except RowError as error:
        raise InputError(f"{ref.where}: {error}") from error


def decode(ref: ImageRef, max_pixels: int) -> Image.Image:
    """Decode as `open_image` does.

    Raises:
        RowError: saying what is wrong without saying where.
    """
    with _opened(ref, max_pixels) as image:
        # Decoders raise nearly anything on hostile bytes.
        try:
            image.load()
            return _to_rgb(image)
        except RowError:
            raise
        except Exception as error:
            raise RowError(f"the image cannot be decoded: {_reason(error)}") from error


def check_header(ref: ImageRef, max_pixels: int) -> int:
    """Check existence, format and size of an image without decoding it.

    Returns:
        Width x height.

    Raises:
        RowError: saying what is wrong.
    """
    with _opened(ref, max_pixels) as image:
        return image.width * image.height


def hash_image(ref: ImageRef) -> bytes:
    """Hash the encoded bytes, as `content_hash`.

    Raises:
        RowError: if the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    with _stream(ref) as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.digest()


def read_image_bytes(ref: ImageRef) -> bytes:
    """Return the encoded bytes of an image.

    Raises:
        InputError: naming `ref.where`, if the file cannot be read.
    """
    try:
        with _stream(ref) as stream:
            return stream.read()
    except RowError as error:
        raise InputError(f"{ref.where}: {error}") from error


def image_suffix(ref: ImageRef, max_pixels: int) -> str:
    """Return the file suffix that belongs to the image's actual format, such as `.png`.

    Raises:
        InputError: naming `ref.where`, if it is no image.
    """
    try:
        with _opened(ref, max_pixels) as image:
            name = (image.format or "").lower()
    except RowError as error:
        raise InputError(f"{ref.where}: {error}") from error
    return {"jpeg": ".jpg", "mpo": ".jpg", "tiff": ".tif"}.get(name, f".{name}")


def to_tensor(image: Image.Image, resolution: int | None = None) -> Tensor:
    """Resize the short side to `resolution`, crop the center square, scale to [0, 1].

    The square is cut out before it is resized (bilinear, antialiased): the same picture, but a
    strip of 1 x 100,000 pixels cannot be blown up on the way.

    Args:
        image: an RGB image.
        resolution: side in pixels; without one the image keeps its size.

    Returns:
        Float32 tensor (3, resolution, resolution), or (3, H, W).
    """
    import numpy as np
    import torch

    if resolution is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != resolution:
            image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def save_png(image: Tensor | Image.Image, path: Path | str) -> None:
    """Save an image as PNG; the file appears complete or not at all.

    Args:
        image: picture, or tensor (3, H, W) in [0, 1], rounded to 8 bits.
        path: file to write; its folder is made.

    Raises:
        InputError: if pixels are not finite, or the file cannot be written.
    """
    picture = image if isinstance(image, Image.Image) else _to_picture(image, path)
    with atomic_path(Path(path)) as temporary:
        picture.save(temporary, format="PNG")


def encode_png(image: Tensor, where: str) -> bytes:
    """Encode a tensor (3, H, W) in [0, 1] as a PNG file, rounded to 8 bits.

    Raises:
        InputError: naming `where`, if pixels are not finite.
    """
    buffer = BytesIO()
    _to_picture(image, where).save(buffer, format="PNG")
    return buffer.getvalue()


@contextmanager
def _opened(ref: ImageRef, max_pixels: int) -> Iterator[Image.Image]:
    with _stream(ref) as stream, warnings.catch_warnings():
        # The size is checked below, against the user's own limit; broken EXIF is not news.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise RowError(f"not an image of an allowed format ({', '.join(FORMATS)})") from error
        except Image.DecompressionBombError as error:
            raise RowError(f"the image has far more than max_pixels {max_pixels} pixels") from error
        except Exception as error:
            raise RowError(f"the image header cannot be read: {_reason(error)}") from error
        with image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height}"
                raise RowError(f"the image has {size} pixels, more than max_pixels {max_pixels}")
            yield image


@contextmanager
def _stream(ref: ImageRef) -> Iterator[IO[bytes]]:
    if isinstance(ref.data, bytes):
        stream: IO[bytes] = BytesIO(ref.data)
    else:
        stream = _open_file(ref.data)
    with stream:
        if not stream.read(1):
            raise RowError("the image is empty (zero bytes)")
        stream.seek(0)
        yield stream


def _open_file(path: Path) -> IO[bytes]:
    if not path.is_file():  # opening a pipe would wait forever
        raise RowError("not a regular file" if path.exists() else "the file does not exist")
    try:
        return path.open("rb")
    except OSError as error:
        raise RowError(f"the file cannot be read: {error.strerror or error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise RowError("the image has 32 bits per channel: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8 bits; Pillow's own conversion would clip or shift."""
    import numpy as np

    wide = np.asarray(image).astype(np.uint32)
    narrow = ((wide * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        narrow[wide == transparent] = 255
    return Image.fromarray(narrow).convert("RGB")


def _to_picture(tensor: Tensor, path: Path | str) -> Image.Image:
    import torch

    pixels = tensor.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(pixels).all()):
        raise InputError(f"{path}: the image has pixels that are not finite; try dtype float32")
    return Image.fromarray(
        (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    )


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
