"""RandAugment: the choice of operations and their magnitudes, in timm's notation and from timm's draws.

timm parses the notation into operations, probabilities, magnitudes and weights. The arguments of the operations are
computed here, because timm's functions draw signs from the global generator.

Source: timm 1.0.31, ``timm/data/auto_augment.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from timm.data import auto_augment as timm_augment
from timm.data.transforms_factory import transforms_imagenet_train

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import ConfigError
from rsb_cluster.train.input.pixels import affine, ops
from rsb_cluster.train.input.pixels.decode import Pixels
from rsb_cluster.train.input.pixels.draws import Draws

Level = Callable[[float, Mapping[str, Any], random.Random], float]

# A magnitude of 10 is the full strength of most operations.
FULL = 10.0


def _negate(value: float, rng: random.Random) -> float:
    return -value if rng.random() > 0.5 else value


def _signed(full: float) -> Level:
    return lambda level, _, rng: _negate(level / FULL * full, rng)


def _whole(full: int, *, most: int, start: int = 0, sign: int = 1) -> Level:
    return lambda level, _, __: start + sign * min(most, int(level / FULL * full))


def _enhance(level: float, _: Mapping[str, Any], __: random.Random) -> float:
    return level / FULL * 1.8 + 0.1


def _enhance_increasing(level: float, _: Mapping[str, Any], rng: random.Random) -> float:
    return max(0.1, 1 + _negate(level / FULL * 0.9, rng))


def _relative(level: float, hparams: Mapping[str, Any], rng: random.Random) -> float:
    share: float = hparams.get("translate_pct", 0.45)
    return _negate(level / FULL * share, rng)


def _absolute(level: float, hparams: Mapping[str, Any], rng: random.Random) -> float:
    return _negate(level / FULL * float(hparams["translate_const"]), rng)


# The argument of an operation for a magnitude; operations without an argument are absent.
LEVELS: dict[str, Level] = {
    "Rotate": _signed(30.0),
    "Posterize": _whole(4, most=99),
    "PosterizeIncreasing": _whole(4, most=99, start=4, sign=-1),
    "PosterizeOriginal": _whole(4, most=99, start=4),
    "Solarize": _whole(256, most=256),
    "SolarizeIncreasing": _whole(256, most=256, start=256, sign=-1),
    "SolarizeAdd": _whole(110, most=128),
    "Color": _enhance,
    "ColorIncreasing": _enhance_increasing,
    "Contrast": _enhance,
    "ContrastIncreasing": _enhance_increasing,
    "Brightness": _enhance,
    "BrightnessIncreasing": _enhance_increasing,
    "Sharpness": _enhance,
    "SharpnessIncreasing": _enhance_increasing,
    "ShearX": _signed(0.3),
    "ShearY": _signed(0.3),
    "TranslateX": _absolute,
    "TranslateY": _absolute,
    "TranslateXRel": _relative,
    "TranslateYRel": _relative,
}

COLOUR: dict[str, Callable[..., Pixels]] = {
    "AutoContrast": ops.auto_contrast,
    "Equalize": ops.equalize,
    "Invert": ops.invert,
    "Posterize": ops.posterize,
    "PosterizeIncreasing": ops.posterize,
    "PosterizeOriginal": ops.posterize,
    "Solarize": ops.solarize,
    "SolarizeIncreasing": ops.solarize,
    "SolarizeAdd": ops.solarize_add,
    "Color": ops.color,
    "ColorIncreasing": ops.color,
    "Contrast": ops.contrast,
    "ContrastIncreasing": ops.contrast,
    "Brightness": ops.brightness,
    "BrightnessIncreasing": ops.brightness,
    "Sharpness": ops.sharpness,
    "SharpnessIncreasing": ops.sharpness,
}

AFFINE: dict[str, Callable[..., Pixels]] = {
    "Rotate": affine.rotate,
    "ShearX": affine.shear_x,
    "ShearY": affine.shear_y,
    "TranslateX": affine.translate_x,
    "TranslateY": affine.translate_y,
    "TranslateXRel": lambda image, share, **how: affine.translate_x(image, share * image.shape[1], **how),
    "TranslateYRel": lambda image, share, **how: affine.translate_y(image, share * image.shape[0], **how),
}


class RandAugment:
    """A recipe's RandAugment on arrays.

    Raises:
        ConfigError: The notation is not RandAugment's, or has operations that are not implemented here.
    """

    def __init__(self, recipe: Recipe) -> None:
        stock = _stock(recipe)
        self.layers: int = stock.num_layers
        self.weights = stock.choice_weights
        self.ops = [_Op(op) for op in stock.ops]

    def __call__(self, image: Pixels, draws: Draws) -> Pixels:
        """Return the augmented image, which may be ``image`` itself."""
        for number in draws.choose(len(self.ops), self.layers, self.weights):
            image = self.ops[number](image, draws.python)
        return image


class _Op:
    """One operation, its probability and its magnitude."""

    def __init__(self, stock: timm_augment.AugmentOp) -> None:
        self.name: str = stock.name
        if self.name not in COLOUR and self.name not in AFFINE:
            raise ConfigError(
                f"augment.rand_augment uses '{self.name}', which the fast pipeline does not support. "
                "Set data.pipeline = 'timm'."
            )
        self._probability: float = stock.prob
        self._magnitude: float = stock.magnitude
        self._std: float = stock.magnitude_std
        self._most: float = stock.magnitude_max or FULL
        self._hparams: dict[str, Any] = stock.hparams
        self._fill = tuple(stock.kwargs["fillcolor"])
        resample = stock.kwargs["resample"]
        self._resample = resample if isinstance(resample, list | tuple) else (resample,)

    def __call__(self, image: Pixels, rng: random.Random) -> Pixels:
        if self._probability < 1 and rng.random() > self._probability:
            return image
        magnitude = self._draw_magnitude(rng)
        arguments = (LEVELS[self.name](magnitude, self._hparams, rng),) if self.name in LEVELS else ()
        if self.name in COLOUR:
            return COLOUR[self.name](image, *arguments)
        resample = rng.choice(self._resample) if len(self._resample) > 1 else self._resample[0]
        return AFFINE[self.name](image, *arguments, cubic=resample == Image.Resampling.BICUBIC, fill=self._fill)

    def _draw_magnitude(self, rng: random.Random) -> float:
        magnitude = self._magnitude
        if self._std == float("inf"):
            magnitude = rng.uniform(0, magnitude)
        elif self._std > 0:
            magnitude = rng.gauss(magnitude, self._std)
        return max(0.0, min(magnitude, self._most))


def _stock(recipe: Recipe) -> timm_augment.RandAugment:
    """Return timm's RandAugment for the notation of a recipe."""
    a = recipe.augment
    if not a.rand_augment.startswith("rand"):
        raise ConfigError(
            f"augment.rand_augment = '{a.rand_augment}' is not of the form 'rand-m7-mstd0.5-inc1', the only one that "
            "the fast pipeline supports. Set data.pipeline = 'timm'."
        )
    try:
        _, secondary, _ = transforms_imagenet_train(
            a.resolution,
            auto_augment=a.rand_augment,
            interpolation=a.interpolation,
            mean=recipe.data.mean,
            std=recipe.data.std,
            separate=True,
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"augment.rand_augment = '{a.rand_augment}': timm cannot read it: {error}.") from error
    stock = secondary.transforms[0]
    assert isinstance(stock, timm_augment.RandAugment)
    return stock
