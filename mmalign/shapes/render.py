"""The Pillow renderer: a scene becomes a 64 x 64 RGB picture with smooth edges."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from mmalign.shapes.scene import BACKGROUNDS, CANVAS, COLORS, Scene

_OVERSAMPLING = 4
_SQUARE_HALF_SIDE = 0.85
_STAR_INNER = 0.45
_CROSS_ARM = 0.34


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of 64 x 64 pixels."""
    side = CANVAS * _OVERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        points = [
            (
                (item.x + item.radius * dx) * _OVERSAMPLING,
                (item.y + item.radius * dy) * _OVERSAMPLING,
            )
            for dx, dy in OUTLINES[item.shape]
        ]
        draw.polygon(points, fill=COLORS[item.color])
    return image.resize((CANVAS, CANVAS), Image.Resampling.BOX)


def _regular(count: int, start: float) -> list[tuple[float, float]]:
    angles = [start + 2 * math.pi * index / count for index in range(count)]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def _star() -> list[tuple[float, float]]:
    corners = _regular(10, -math.pi / 2)
    return [
        (x * (1.0 if index % 2 == 0 else _STAR_INNER), y * (1.0 if index % 2 == 0 else _STAR_INNER))
        for index, (x, y) in enumerate(corners)
    ]


def _cross() -> list[tuple[float, float]]:
    arm = _CROSS_ARM
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    points = []
    for turn in range(4):
        cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][turn]
        points += [(x * cos - y * sin, x * sin + y * cos) for x, y in quarter]
    return points


_S = _SQUARE_HALF_SIDE
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(48, 0.0),
    "square": [(-_S, -_S), (_S, -_S), (_S, _S), (-_S, _S)],
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "star": _star(),
    "cross": _cross(),
}
"""Unit outlines: points in units of the object's radius, y pointing down."""
