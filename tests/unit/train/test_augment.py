"""timm's own transforms, as a function of a seed."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.train.augment import Mix, Normalise, TrainTransform, seed_everything, seed_micro_batch


def noise(side: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_the_same_seed_gives_the_same_pixels_whatever_was_drawn_before() -> None:
    transform = TrainTransform(load_recipe("a2", overrides=parse_overrides(["augment.resolution=32"])).recipe)
    first = transform(noise(), 5)
    transform(noise(), 6)
    torch.rand(3)
    assert torch.equal(transform(noise(), 5), first)
    assert not torch.equal(transform(noise(), 6), first)
    assert first.dtype == torch.uint8 and first.shape == (3, 32, 32)


def test_deits_randaugment_takes_every_magnitude() -> None:
    """At magnitude 10 timm posterizes to 0 bits, which Pillow 13 refuses; then the image is black, as it used to be."""
    recipe = load_recipe(
        "deit", overrides=parse_overrides(["augment.resolution=16", "augment.rand_augment=rand-m10-inc1"])
    ).recipe
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
    recipe = load_recipe("deit", overrides=parse_overrides(["data.num_classes=4", *assignments])).recipe
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


Mixed = dict[tuple[int, int], tuple[list[float], float]]


def mixed_by(processes: int, virtual_ranks: int, seed: int, steps: list[int]) -> Mixed:
    """The shares and the pixels' sum of each micro-batch, where so many processes share the virtual ranks."""
    recipe = load_recipe("deit", overrides=parse_overrides(["data.num_classes=4"])).recipe  # Mixup, CutMix and erasing
    images, labels = torch.linspace(0, 1, 4 * 3 * 16 * 16).view(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    each, found = virtual_ranks // processes, {}
    for process in range(processes):
        mix = Mix(recipe, torch.device("cpu"))
        for step in steps:
            for virtual_rank in range(process * each, (process + 1) * each):
                seed_micro_batch(seed, step, virtual_rank)
                mixed_images, shares = mix(images.clone(), labels)
                found[step, virtual_rank] = (shares.flatten().tolist(), float(mixed_images.double().sum()))
                torch.rand(1 + process)  # as dropout draws
    return found


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(0, 2**40), st.lists(st.integers(0, 10**6), min_size=1, max_size=3), st.data())
def test_each_micro_batch_is_mixed_alike_on_any_number_of_processes(
    virtual_ranks: int, seed: int, steps: list[int], data: st.DataObject
) -> None:
    """One λ each, the same wherever it is computed and whatever was drawn before; another in every micro-batch."""
    processes = data.draw(st.sampled_from([n for n in range(1, virtual_ranks + 1) if virtual_ranks % n == 0]))
    found = mixed_by(processes, virtual_ranks, seed, steps)
    assert found == mixed_by(1, virtual_ranks, seed, steps)
    last = (steps[-1], virtual_ranks - 1)
    assert found[last] == mixed_by(virtual_ranks, virtual_ranks, seed, steps[-1:])[last], "resumed at this step"
    if len(found) >= 12:
        assert len({tuple(shares) for shares, _ in found.values()}) > 3


def test_without_mixing_shares_are_the_labels() -> None:
    _, shares = mixed(1, "augment.mixup=0", "augment.cutmix=0")
    assert shares.argmax(1).tolist() == [0, 1, 2, 3, 0, 1] and shares.max() == 1 and shares.sum() == 6
