"""InDL (arXiv:2305.17716): geometric illusions, each with a yes-or-no question, generated here.

The authors draw theirs with pyllusion and Matplotlib without a seed, so their images are not available. These follow
the geometry and the parameter ranges of their script (differences, strengths, angles, 128 pixels and two colours;
Hering in red on black), but are drawn with Pillow and a seed: *our reconstruction*. In half of the images there is no
difference between the two lines of the question (class 1, "same"), as in their script.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from rsb_cluster.data.sources.lists import INDL_CLASSES
from rsb_cluster.data.sources.source import SHUFFLE_SEED, DataSource, Sample, as_png
from rsb_cluster.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

Point = tuple[float, float]
Line = tuple[Point, Point]
Uniform = Callable[[float, float], float]

SAMPLES = {"train": 8000, "val": 2000}  # the authors' published predictions are for 2,000 test images a set, a fifth
SETS = ("hering", "muller-lyer", "poggendorff", "vertical-horizontal", "zollner")

_SIDE_PX = 128
_SUPERSAMPLING = 4  # images are drawn larger by this factor, then scaled down


def indl(name: str, split: str) -> DataSource:
    """Return one of the five sets of illusions; images are drawn when they are read."""
    if split not in SAMPLES:
        raise ConfigError(f"InDL has no split '{split}'. It has: {', '.join(SAMPLES)}.")
    number = SETS.index(name)
    start = 0 if split == "train" else SAMPLES["train"]
    entries = [(number, i) for i in range(start, start + SAMPLES[split])]
    return DataSource(f"InDL's {name}, {split}, drawn here", INDL_CLASSES, entries, _draw, class_of=_class_of)


def _draw(entry: tuple[int, int]) -> Sample:
    number, i = entry
    uniform = _uniform(entry)
    label = int(uniform(0, 1) < 0.5)
    image = (_hering, _muller_lyer, _poggendorff, _vertical_horizontal, _zollner)[number](uniform, bool(label))
    return f"{SETS[number]}-{i:05d}", as_png(image), "png", label


def _class_of(entry: tuple[int, int]) -> int:
    return int(_uniform(entry)(0, 1) < 0.5)  # the first draw of _draw()


def _uniform(entry: tuple[int, int]) -> Uniform:
    """Return the draws of an image."""
    # Raw words, as only these stay the same in later versions of NumPy.
    generator = np.random.Philox(np.random.SeedSequence((SHUFFLE_SEED, *entry)))
    return lambda low, high: low + (high - low) * float(generator.random_raw() >> np.uint64(11)) * 2.0**-53


def _hering(uniform: Uniform, same: bool) -> Image.Image:
    """Are the two red lines straight, in front of a fan of black ones?"""
    steepest, step = uniform(1, 6), uniform(0.1, 0.25)
    bend = 0.0 if same else math.copysign(uniform(0.001, 0.08), uniform(-1, 1))
    top = max(4.0, 2 * steepest)
    fan = [((-2.0, 2 * s / top * 2), (2.0, -2 * s / top * 2)) for s in np.arange(-steepest, steepest, step).tolist()]
    y = 4 / top * 2
    bars: list[Line] = []
    for side in (-1, 1):
        middle = (side * (1 - bend), 0.0)
        bars += [((side, -y), middle), (middle, (side, y))]
    return _picture(fan, 4.4, uniform(1, 180), red=bars)


def _muller_lyer(uniform: Uniform, same: bool) -> Image.Image:
    """Are the two shafts equally long, one with fins inwards and one with fins outwards?"""
    difference = 0.0 if same else uniform(-0.5, 0.5)
    strength, distance = math.radians(uniform(25, 35)), uniform(0.8, 1.2)
    lines: list[Line] = []
    for y, inwards, longer in ((distance / 2, 1, difference > 0), (-distance / 2, -1, difference < 0)):
        half = 0.25 * (1 + abs(difference) * longer)
        lines.append(((-half, y), (half, y)))
        for side in (-1, 1):
            for up in (-1, 1):
                fin = (side * half - side * inwards * 0.25 * math.sin(strength), y + up * 0.25 * math.cos(strength))
                lines.append(((side * half, y), fin))
    return _picture(lines, 2.0, uniform(0, 180), width=2)


def _poggendorff(uniform: Uniform, same: bool) -> Image.Image:
    """Are the two ends of a slanted line, whose middle is hidden by a bar, collinear?"""
    difference = 0.0 if same else uniform(0.001, 0.3)
    slope = math.radians(uniform(1, 60))
    along = (0.75 * math.cos(slope), 0.75 * math.sin(slope))
    lines = [((0.0, 0.0), (-along[0], -along[1])), ((0.0, difference), (along[0], along[1] + difference))]
    bar = [(-0.25, -0.875), (0.25, -0.875), (0.25, 0.875), (-0.25, 0.875)]
    return _picture(lines, 2.0, uniform(0, 180), bar=bar)


def _vertical_horizontal(uniform: Uniform, same: bool) -> Image.Image:
    """Are a vertical and a horizontal line equally long?"""
    difference = 0.0 if same else uniform(0.001, 0.3)
    lean = math.radians(uniform(60, 90))
    lying = (0.25 + 0.5 * math.sin(lean), -0.25 + 0.5 * math.cos(lean))
    return _picture([((-0.25, -0.25), (-0.25, -0.25 + 0.5 * (1 + difference))), ((0.25, -0.25), lying)], 2.0, 0)


def _zollner(uniform: Uniform, same: bool) -> Image.Image:
    """Are the two long lines parallel, crossed by short ones?"""
    tilt = math.radians(0.0 if same else uniform(0.001, 9))
    cross = math.radians(uniform(45, 65))
    lines: list[Line] = []
    for y, turn in ((0.33, tilt), (-0.33, -tilt)):
        lines.append(((-2.0, y - 2 * math.tan(turn)), (2.0, y + 2 * math.tan(turn))))
        lean = math.copysign(cross, y)
        dx, dy = 0.33 * math.sin(lean), 0.33 * math.cos(lean)
        for x in np.linspace(-0.9, 0.9, 8).tolist():
            on = y + x * math.tan(turn)
            lines.append(((x - dx, on - dy), (x + dx, on + dy)))
    return _picture(lines, 2.0, uniform(0, 180))


def _picture(
    lines: list[Line],
    span: float,
    degrees: float,
    *,
    width: int = 1,
    bar: list[Point] | None = None,
    red: list[Line] | None = None,
) -> Image.Image:
    """Draw black lines, a bar that covers them, and red lines, rotated about the centre of a square of width span."""
    from PIL import Image, ImageDraw

    side = _SIDE_PX * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def place(point: Point) -> Point:
        x, y = point[0] / span * side, point[1] / span * side
        return side / 2 + x * cos - y * sin, side / 2 - x * sin - y * cos

    for start, end in lines:
        draw.line([place(start), place(end)], "black", width * _SUPERSAMPLING)
    if bar:
        draw.polygon([place(point) for point in bar], "white", "black", _SUPERSAMPLING)
    for start, end in red or ():
        draw.line([place(start), place(end)], "red", 2 * _SUPERSAMPLING)
    small = image.reduce(_SUPERSAMPLING)
    return small if red else small.convert("L").point(lambda value: 255 if value > 210 else 0)
