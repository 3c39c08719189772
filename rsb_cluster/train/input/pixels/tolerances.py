"""Bounds of the differences to the pixels of timm on PIL, in grey levels of 0..255. Only the tests read them.

Measured with timm 1.0.31, Pillow 13.0.0, OpenCV 5.0.0 and torch 2.15.0, on photographs and on noise and patterns.
Operations that are not named are equal. A difference of 1 arises where PIL's sum is close to an integer, so truncation
may go either way. Rotate needs OpenCV 5: the bilinear remap of OpenCV 4 resolves only 32nds of a pixel, and is off by
up to several levels.
"""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Bounds for one image."""

    most: int  # largest difference of a sample
    share: float  # share of the samples that differ
    most_of_pattern: int  # the same two for noise and checkerboards
    share_of_pattern: float


EXACT = Tolerance(0, 0.0, 0, 0.0)

# The mean grey is off by one at a tie; magnitudes up to 20.
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

# Whole images, the same seed in both pipelines. RandAugment amplifies some differences of 1 (Solarize, Equalize).
TRAIN_MEAN = 0.05  # of a hundred images
TRAIN_MEAN_WORST = 1.5  # of an image
CROP_BICUBIC = 16  # without RandAugment, a sample
CROP_BILINEAR = 2

EVAL_MOST = 2
EVAL_MEAN = 0.01

# Pillow 13 shrinks the rows of a high and narrow image first, torch its columns: another intermediate image is rounded,
# and clipped where bicubic overshoots.
EVAL_NARROW_MOST = 4
EVAL_NARROW_MEAN = 0.2
EVAL_NARROW_MOST_OF_PATTERN = 24  # of black and white squares
EVAL_NARROW_MEAN_OF_PATTERN = 4.0
