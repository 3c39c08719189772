"""From a decoded image to the model's input: timm's own transforms as functions of a seed.

On the CPU, per sample: crop, resize, flip, RandAugment; the result is uint8. On the device, per micro-batch: normalise,
erase, mix. Legend: B images of a micro-batch, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform, random_erasing, transforms
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from rsb_cluster.config.recipe import Eval, Recipe
from rsb_cluster.data.order import derive_seed

# What timm's modules draw from in place of Python's global generator. That one is shared by all threads, and clients of
# S3 draw the pause before they try again from it: between the seed and the draw, at any time.
_PYTHON = random.Random()
for _module in (auto_augment, random_erasing, transforms):
    vars(_module)["random"] = _PYTHON


def seed_everything(seed: int) -> None:
    """Seed the three generators that timm draws from. Not for use in threads, which share them."""
    _PYTHON.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


def seed_micro_batch(seed: int, step: int, virtual_rank: int) -> None:
    """Seed the global generators for one micro-batch of a run; the same on any process."""
    seed_everything(derive_seed(seed, step, virtual_rank, 3))


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Posterize like Pillow before version 13, which rejects the 0 bits that timm uses at magnitude 10: to black."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else image.point(lambda _: 0)


auto_augment.NAME_TO_OP |= {
    name: _posterize for name, operation in auto_augment.NAME_TO_OP.items() if operation is auto_augment.posterize
}


class TrainTransform:
    """timm's training transform as a function of (image, seed), to uint8 of shape (C, H, W)."""

    def __init__(self, recipe: Recipe) -> None:
        a = recipe.augment
        self._transform: Any = create_transform(
            (3, a.resolution, a.resolution),
            is_training=True,
            use_prefetcher=True,  # uint8 out; normalisation and erasing are left to the device
            scale=a.crop_scale,
            ratio=a.crop_ratio,
            hflip=a.hflip,
            color_jitter=a.color_jitter,
            auto_augment=a.rand_augment or None,
            interpolation=a.interpolation,
            mean=recipe.data.mean,
            std=recipe.data.std,
        )

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Augment one image with the randomness of its seed."""
        seed_everything(seed)
        result: Tensor = self._transform(image)
        return result


class EvalTransform:
    """timm's evaluation transform, to uint8 of shape (C, H, W); the seed is not used."""

    def __init__(self, spec: Eval) -> None:
        self._transform: Any = create_transform(
            (3, spec.resolution, spec.resolution),
            is_training=False,
            use_prefetcher=True,  # uint8 out; normalisation is left to the device
            interpolation=spec.interpolation,
            crop_pct=spec.crop,
        )

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Resize and crop one image."""
        result: Tensor = self._transform(image)
        return result


class Normalise:
    """Turns uint8 images on the device into normalised floats.

    Args:
        mean: Mean of each channel, on a scale of 0 to 1.
        std: Standard deviation of each channel, likewise.
        device: Device of the images.
        channels_last: Memory format of the result.
    """

    def __init__(
        self,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        *,
        channels_last: bool,
    ) -> None:
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(mean, device=device).view(shape) * 255
        self._std = torch.tensor(std, device=device).view(shape) * 255
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Return ``(x/255 − mean) / std`` as float32."""
        normalised = (images_BCHW - self._mean) / self._std  # the bytes become floats in the subtraction
        return normalised.contiguous(memory_format=self._format)


class Mix:
    """Erasing, Mixup and CutMix of one micro-batch, with the randomness of (seed, step, virtual rank).

    The caller seeds the generators. One λ serves the whole micro-batch, as with timm's mode ``batch`` and one
    process per GPU. CutMix's boxes are timm's, which can be a pixel larger than the paper's (arXiv:1905.04899); λ is
    corrected to the box, so the targets are those of the pixels.

    Args:
        recipe: The recipe.
        device: Device of the images.
        slots: The images of a micro-batch that this process has; empty: all. Where several processes share it, each
            draws for all its images.
        micro_batch: Images of the whole micro-batch.
    """

    def __init__(self, recipe: Recipe, device: torch.device, slots: Sequence[int] = (), micro_batch: int = 0) -> None:
        a, self._classes = recipe.augment, recipe.data.num_classes
        self._position = {slot: i for i, slot in enumerate(slots)}
        self._micro_batch = micro_batch
        self._erase = RandomErasing(a.erase_prob, mode=a.erase_mode, device=device) if a.erase_prob else None
        self._mixup = None
        if a.mixup or a.cutmix:
            self._mixup = Mixup(
                mixup_alpha=a.mixup,
                cutmix_alpha=a.cutmix,
                prob=a.mix_prob,
                switch_prob=a.mix_switch_prob,
                mode="batch",
                label_smoothing=0.0,  # targets() smooths, as it must know which classes were mixed
                num_classes=self._classes,
            )

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed images and the share of each class in them, shape (B, K), float32."""
        if self._erase is not None:
            images_BCHW = self._erase(images_BCHW) if not self._position else self._erase_part(images_BCHW)
        if self._mixup is None:
            return images_BCHW, torch.nn.functional.one_hot(labels_B, self._classes).float()
        mixed_BCHW, weights_BK = self._mixup(images_BCHW, labels_B)
        return mixed_BCHW, weights_BK

    def _erase_part(self, images_BCHW: Tensor) -> Tensor:
        """Erase a part of the images of a micro-batch; what is drawn for the others is thrown away."""
        assert self._erase is not None
        other_CHW = torch.empty_like(images_BCHW[0])
        for slot in range(self._micro_batch):
            position = self._position.get(slot)
            self._erase(other_CHW if position is None else images_BCHW[position])
        return images_BCHW
