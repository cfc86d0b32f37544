"""The exact parser: reads a picture back into the scene it shows.

It is the judge of Shapes world. It knows nothing of prompts or models: every color region is cut
out and compared with the renderer's own outlines. Regions that are no clean object make the picture
invalid, so blurred or melted pictures do not pass for scenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from mmalign.shapes.render import render
from mmalign.shapes.scene import BACKGROUNDS, CANVAS, COLORS, SHAPES, Scene, SceneObject

Array = NDArray[np.float64]

COLOR_TOLERANCE = 70.0  # RGB distance of a core pixel to its palette color
MIN_AREA = 12  # core pixels of a region that counts as something
MIN_OVERLAP = 0.72  # intersection over union with the best outline
MAX_STRAY = 40  # pixels of neither background nor object that a clean picture may have
_EDGE_SHARE = 0.7
_TEMPLATE = 24
_TEMPLATE_RADIUS = 20.0


@dataclass(frozen=True, slots=True)
class ParsedImage:
    """What the parser saw: a scene, and whether everything in the picture was a clean object."""

    scene: Scene
    valid: bool


def parse_image(image: Image.Image | NDArray[np.uint8]) -> ParsedImage:
    """Read a 64 x 64 RGB picture.

    Raises:
        ValueError: the picture has another size.
    """
    pixels = np.asarray(image, dtype=np.float64)
    if pixels.shape != (CANVAS, CANVAS, 3):
        raise ValueError(f"expected a {CANVAS} x {CANVAS} RGB picture, got shape {pixels.shape}")
    background = _background(pixels)
    nearest, distance = _nearest_palette(pixels)
    objects: list[SceneObject] = []
    clean = True
    explained = np.zeros((CANVAS, CANVAS), dtype=bool)
    for core, color in _regions(nearest, distance):
        if explained[core].mean() > _EDGE_SHARE:
            continue  # the blended rim of an object that has been read already
        found = _read_region(core, pixels, background, color)
        explained |= ndimage.binary_dilation(core, iterations=3)
        if found is None:
            clean = False
        else:
            objects.append(found)
    ground = np.linalg.norm(pixels - np.array(BACKGROUNDS[background]), axis=-1)
    stray = (ground > COLOR_TOLERANCE) & ~explained
    valid = clean and bool(objects) and int(stray.sum()) <= MAX_STRAY
    return ParsedImage(Scene(objects=tuple(objects), background=background), valid)


def _regions(nearest: NDArray[np.intp], distance: Array) -> list[tuple[NDArray[np.bool_], str]]:
    """Cut out the connected regions of every color, largest first."""
    regions = []
    for index, color in enumerate(COLORS):
        labels, count = ndimage.label((nearest == index) & (distance < COLOR_TOLERANCE))
        cores = [labels == label for label in range(1, count + 1)]
        regions += [(core, color) for core in cores if core.sum() >= MIN_AREA]
    return sorted(regions, key=lambda region: -int(region[0].sum()))


def _background(pixels: Array) -> str:
    """Name the background by its share of near pixels."""
    share = {
        name: (np.linalg.norm(pixels - np.array(value), axis=-1) < COLOR_TOLERANCE).mean()
        for name, value in BACKGROUNDS.items()
    }
    return max(share, key=share.__getitem__)


def _nearest_palette(pixels: Array) -> tuple[NDArray[np.intp], Array]:
    palette = np.array([*COLORS.values(), *BACKGROUNDS.values()], dtype=np.float64)
    distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    return distances.argmin(-1), distances.min(-1)


def _read_region(
    core: NDArray[np.bool_], pixels: Array, background: str, color: str
) -> SceneObject | None:
    """Match one region against the outlines; None when it is no clean object."""
    coverage = _coverage(core, pixels, background, color)
    rows, columns = np.nonzero(coverage > 0.5)
    if not len(rows):
        return None
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    height, width = bottom - top, right - left
    if max(height, width) > 1.5 * min(height, width):
        return None
    patch = _resize(coverage[top:bottom, left:right])
    overlaps = {shape: _overlap(patch, template) for shape, template in _templates().items()}
    shape = max(overlaps, key=overlaps.__getitem__)
    if overlaps[shape] < MIN_OVERLAP:
        return None
    extent_x, extent_y, offset_y = _extents()[shape]
    radius = (width / extent_x + height / extent_y) / 2
    return SceneObject(
        shape=shape,
        color=color,
        x=float(left + width / 2),
        y=float(top + height / 2 - offset_y * radius),
        radius=float(radius),
    )


def _coverage(core: NDArray[np.bool_], pixels: Array, background: str, color: str) -> Array:
    """Estimate how much of each pixel near `core` the object covers, in [0, 1]."""
    ground = np.array(BACKGROUNDS[background], dtype=np.float64)
    axis = np.array(COLORS[color], dtype=np.float64) - ground
    amount = ((pixels - ground) @ axis) / (axis @ axis)
    near = ndimage.binary_dilation(core, iterations=2)
    return np.where(core, 1.0, np.where(near, amount.clip(0.0, 1.0), 0.0))


def _resize(patch: Array) -> Array:
    image = Image.fromarray((patch * 255).astype(np.uint8))
    small = image.resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float64) / 255


def _overlap(first: Array, second: Array) -> float:
    return float(np.minimum(first, second).sum() / np.maximum(first, second).sum())


@cache
def _silhouettes() -> dict[str, Array]:
    """Render every shape alone, black on white, and return its coverage."""
    silhouettes = {}
    for shape in SHAPES:
        item = SceneObject(shape=shape, color="red", x=32.0, y=32.0, radius=_TEMPLATE_RADIUS)
        picture = np.asarray(render(Scene(objects=(item,), background="black")), dtype=np.float64)
        silhouettes[shape] = picture[:, :, 0] / COLORS["red"][0]
    return silhouettes


@cache
def _templates() -> dict[str, Array]:
    return {shape: _resize(coverage[_box(coverage)]) for shape, coverage in _silhouettes().items()}


@cache
def _extents() -> dict[str, tuple[float, float, float]]:
    """Per shape: width, height and vertical offset of its box, in units of the radius."""
    extents = {}
    for shape, coverage in _silhouettes().items():
        rows, columns = _box(coverage)
        width, height = columns.stop - columns.start, rows.stop - rows.start
        offset = (rows.start + rows.stop) / 2 - CANVAS / 2
        extents[shape] = tuple(v / _TEMPLATE_RADIUS for v in (width, height, offset))
    return extents


def _box(coverage: Array) -> tuple[slice, slice]:
    rows, columns = np.nonzero(coverage > 0.5)
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
