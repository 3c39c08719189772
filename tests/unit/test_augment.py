"""timm's own transforms, as a function of a seed."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rsb_cluster.catalog import load_recipe
from rsb_cluster.train.augment import Mix, Normalise, TrainTransform, seed_everything


def noise(side: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_the_same_seed_gives_the_same_pixels_whatever_was_drawn_before() -> None:
    transform = TrainTransform(load_recipe("a2", assignments=["augment.resolution=32"]).recipe)
    first = transform(noise(), 5)
    transform(noise(), 6)
    torch.rand(3)
    assert torch.equal(transform(noise(), 5), first)
    assert not torch.equal(transform(noise(), 6), first)
    assert first.dtype == torch.uint8 and first.shape == (3, 32, 32)


def test_deits_randaugment_takes_every_magnitude() -> None:
    """At magnitude 10 timm posterizes to 0 bits, which Pillow 13 refuses; then the image is black, as it used to be."""
    recipe = load_recipe("deit", assignments=["augment.resolution=16", "augment.rand_augment=rand-m10-inc1"]).recipe
    transform = TrainTransform(recipe)
    found = [transform(noise(20), seed) for seed in range(300)]
    assert any(int(image.max()) == 0 for image in found)


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalise_gives_zero_mean_and_unit_deviation_of_the_recipes_statistics(channels_last: bool) -> None:
    recipe = load_recipe("a1").recipe
    normalise = Normalise(recipe.data.mean, recipe.data.std, torch.device("cpu"), channels_last=channels_last)
    images = torch.tensor([round(255 * m) for m in recipe.data.mean], dtype=torch.uint8).view(1, 3, 1, 1)
    images = images.expand(2, 3, 4, 4).contiguous()
    found = normalise(images)
    assert found.abs().max() < 0.01
    brighter = normalise(images + 51)
    torch.testing.assert_close((brighter - found)[0, :, 0, 0], 0.2 / torch.tensor(recipe.data.std))


def mixed(seed: int, *assignments: str) -> tuple[Any, Any]:
    recipe = load_recipe("deit", assignments=["data.num_classes=4", *assignments]).recipe
    mix = Mix(recipe, torch.device("cpu"))
    seed_everything(seed)
    generator = torch.Generator().manual_seed(0)
    return mix(torch.randn(6, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1]))


def test_mixing_is_a_function_of_the_seed_and_its_shares_sum_to_one() -> None:
    images, shares = mixed(1)
    again, same = mixed(1)
    assert torch.equal(images, again) and torch.equal(shares, same)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    assert any(not torch.equal(mixed(seed)[1], shares) for seed in range(2, 5))


def test_without_mixing_shares_are_the_labels() -> None:
    _, shares = mixed(1, "augment.mixup=0", "augment.cutmix=0")
    assert shares.argmax(1).tolist() == [0, 1, 2, 3, 0, 1] and shares.max() == 1 and shares.sum() == 6
