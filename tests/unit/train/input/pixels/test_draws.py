"""What is drawn for an image."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rsb_cluster.train.input.pixels.crop import _below
from rsb_cluster.train.input.pixels.draws import seeded_draws

SEEDS = [
    0,
    1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
    *(random.Random(7).getrandbits(64) for _ in range(2000)),
]


def test_flips_come_with_the_recipes_probability() -> None:
    for probability in (0.0, 0.3, 1.0):
        share = np.mean([seeded_draws(seed).flips(probability) for seed in range(4000)])
        assert share == pytest.approx(probability, abs=0.03)


def test_a_flip_is_torchs_own_draw() -> None:
    generator = torch.Generator()
    for seed in SEEDS:
        generator.manual_seed(seed % 2**63)
        drawn = torch.rand(2, generator=generator).tolist()
        exact = seeded_draws(seed)
        assert not exact.flips(drawn[0]) and exact.flips(np.nextafter(drawn[1], 2)), "the draw itself, to the bit"


@pytest.mark.parametrize("weighted", [False, True])
def test_a_choice_is_numpys_own_draw(weighted: bool) -> None:
    generator = np.random.RandomState()
    for seed in SEEDS:
        count = seed % 40 + 3
        weights = np.arange(1, count + 1) / sum(range(1, count + 1)) if weighted else None
        generator.seed(seed % 2**32)
        expected = generator.choice(count, 3, replace=not weighted, p=weights).tolist()
        assert seeded_draws(seed).choose(count, 3, weights) == expected


def test_a_number_below_another_is_pythons_own_draw() -> None:
    for seed in SEEDS:
        one, other = random.Random(seed), random.Random(seed)
        for stop in (1, 2, 3, 8, 500, 513):
            assert _below(stop, one) == other.randint(0, stop - 1)
