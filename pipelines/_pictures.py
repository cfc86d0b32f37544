"""Pictures inside a page that needs no other file."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmalign.data.images import open_image
from mmalign.report import PICTURE_PIXELS
from mmalign.types import ImageRef

MAX_PIXELS = 50_000_000
SMALL = 150
"""Pictures up to this side are shown exactly; larger ones become JPEG, which is smaller."""
QUALITY = 85


class Embedded(NamedTuple):
    """A picture as the address of an `img`, and whether its pixels should stay sharp."""

    uri: str
    tiny: bool


@cache
def embed(file: Path) -> Embedded:
    """Encode a picture, at most `PICTURE_PIXELS` wide or high.

    Raises:
        InputError: if it cannot be read.
    """
    picture = open_image(ImageRef(file, str(file)), max_pixels=MAX_PIXELS)
    tiny = max(picture.size) <= SMALL
    picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"optimize": True} if tiny else {"quality": QUALITY}
    picture.save(buffer, "PNG" if tiny else "JPEG", **options)
    kind = "png" if tiny else "jpeg"
    return Embedded(
        f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", tiny
    )
