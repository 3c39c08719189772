"""From encoded bytes and a seed to the pixels of a sample.

Both transforms are thread-safe and can be pickled.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from rsb_cluster.config.recipe import Eval, Recipe
from rsb_cluster.errors import ConfigError
from rsb_cluster.train.augment import EvalTransform
from rsb_cluster.train.input.pixels.crop import eval_crop, random_box, resize
from rsb_cluster.train.input.pixels.decode import EncodedImage, Pixels, open_with_pil
from rsb_cluster.train.input.pixels.draws import seeded_draws
from rsb_cluster.train.input.pixels.randaugment import RandAugment

Transform = Callable[[EncodedImage, int, Pixels], None]

_INTERPOLATIONS = {"bicubic": ("bicubic",), "bilinear": ("bilinear",), "random": ("bilinear", "bicubic")}

# One image per thread is faster than many threads on one image. Nothing else here uses OpenCV.
cv2.setNumThreads(0)


class FastTrain:
    """The training transform: crop, resize, flip, RandAugment.

    Raises:
        ConfigError: The recipe uses something that only timm's own transforms support.
    """

    def __init__(self, recipe: Recipe) -> None:
        a = self._augment = recipe.augment
        # timm disables colour jitter with RandAugment, but not with its set '3a'.
        if a.color_jitter and (not a.rand_augment or "3a" in a.rand_augment):
            raise ConfigError(
                f"augment.color_jitter = {a.color_jitter}: the fast pipeline does not support it. "
                "Set data.pipeline = 'timm'."
            )
        self._interpolations = _INTERPOLATIONS[a.interpolation]
        self._rand_augment = RandAugment(recipe) if a.rand_augment else None

    def __call__(self, source: EncodedImage, seed: int, out: Pixels) -> None:
        """Write the augmented image.

        Args:
            source: The image; the rows that are already decoded do not change the result.
            seed: The seed of all random numbers.
            out: The result: uint8, shape (resolution, resolution, 3), any strides; RGB.

        Raises:
            BadImageError: The image cannot be decoded; ``out`` is unchanged.
        """
        a, side = self._augment, self._augment.resolution
        _check(out, side)
        draws = seeded_draws(seed)
        box = random_box(source.height, source.width, draws.python, scale=a.crop_scale, ratio=a.crop_ratio)
        several = len(self._interpolations) > 1
        interpolation = draws.python.choice(self._interpolations) if several else self._interpolations[0]
        image = resize(box.crop(source.rows(box.top + box.height)), side, side, interpolation)
        if draws.flips(a.hflip):
            image = cv2.flip(image, 1)  # type: ignore[assignment]
        if self._rand_augment is not None:
            image = self._rand_augment(image, draws)
        np.copyto(out, image)


class FastEval:
    """The evaluation transform: resize, centre crop.

    Args:
        spec: The settings; with ``exact``, timm's transform on PIL is used, which takes more than twice as long.
    """

    def __init__(self, spec: Eval) -> None:
        self._eval = spec
        self._stock = EvalTransform(spec) if spec.exact else None

    def __call__(self, source: EncodedImage, seed: int, out: Pixels) -> None:
        """Write the image; ``seed`` is not used. See ``FastTrain`` for the rest.

        Raises:
            BadImageError: The image cannot be decoded, or is too long and narrow.
        """
        e = self._eval
        _check(out, e.resolution)
        if self._stock is not None:
            np.copyto(out, self._stock(open_with_pil(source.encoded), seed).permute(1, 2, 0).numpy())
        else:
            np.copyto(out, eval_crop(source.rows(source.height), e.resolution, e.crop, e.interpolation))


def _check(out: Pixels, side: int) -> None:
    if out.shape != (side, side, 3) or out.dtype != np.uint8:
        raise ValueError(f"out is {out.dtype} of shape {out.shape}; it must be uint8 of shape {(side, side, 3)}")
