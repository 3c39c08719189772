"""What is drawn for an image."""

from __future__ import annotations

import numpy as np
import pytest

from rsb_cluster.train.input.pixels.draws import seeded_draws


def test_flips_come_with_the_recipes_probability() -> None:
    for probability in (0.0, 0.3, 1.0):
        share = np.mean([seeded_draws(seed).flips(probability) for seed in range(4000)])
        assert share == pytest.approx(probability, abs=0.03)
