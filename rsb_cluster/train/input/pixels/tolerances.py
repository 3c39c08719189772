"""How far the pixels may be from those of timm on PIL, in grey levels of 0..255. Read by the tests only.

Seen with timm 1.0.31, Pillow 13.0.0, OpenCV 5.0.0 and torch 2.15.0, on photographs and on noise and patterns. What is
not named is equal. Where the difference is 1, PIL's sum lies on a whole number, and its cut falls to either side.
Rotate needs OpenCV 5: the bilinear remap of OpenCV 4 knows only 32nds of a pixel, and is off by up to several levels.
"""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Bounds for one image."""

    most: int  # largest difference of a sample
    share: float  # of the samples that differ
    most_of_pattern: int  # the first two again, for noise and checkerboards
    share_of_pattern: float


EXACT = Tolerance(0, 0.0, 0, 0.0)

# A mean grey that is off by one at a tie; strengths up to 20.
_BLEND = Tolerance(3, 0.002, 3, 0.002)
_SHEAR = Tolerance(1, 0.04, 1, 0.05)
_TRANSLATE = Tolerance(1, 0.1, 1, 0.12)

OPS: dict[str, Tolerance] = {
    "Color": _BLEND,
    "ColorIncreasing": _BLEND,
    "ShearX": _SHEAR,
    "ShearY": _SHEAR,
    "TranslateX": _TRANSLATE,
    "TranslateY": _TRANSLATE,
    "TranslateXRel": _TRANSLATE,
    "TranslateYRel": _TRANSLATE,
    "Rotate": Tolerance(1, 0.003, 1, 0.01),
}

# Bicubic rotation lacks the mixed term of two axes; see ``affine``. All else is as with bilinear.
ROTATE_BICUBIC = Tolerance(4, 0.2, 8, 0.5)

# Whole images, the same seed in both pipelines. RandAugment blows up some differences of 1 (Solarize, Equalize).
TRAIN_MEAN = 0.05  # of a hundred images
TRAIN_MEAN_WORST = 1.5  # of an image
CROP_BICUBIC = 16  # without RandAugment, a sample
CROP_BILINEAR = 2

EVAL_MOST = 2
EVAL_MEAN = 0.01
