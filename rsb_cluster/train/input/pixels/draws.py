"""The random generators of a sample."""

from __future__ import annotations

import random
import threading

import numpy as np
from numpy.typing import NDArray


class Draws:
    """The three generators that timm draws from, local to a thread.

    timm draws the flip from torch, the choice of operations from NumPy, and all else from Python. This class does the
    same, with the seeds of ``augment.seed_everything``, so a seed gives the same draws in both pipelines.

    Attributes:
        python: Python's generator.
    """

    def __init__(self) -> None:
        self.python = random.Random()
        self._numpy = np.random.RandomState()
        # torch's generator is the same Mersenne twister, seeded alike; to call NumPy's takes a third of the time.
        self._torch = np.random.RandomState()
        self._numpy_word, self._torch_word = (s._bit_generator.random_raw for s in (self._numpy, self._torch))

    def flips(self, probability: float) -> bool:
        """Draw whether to flip, as torchvision's RandomHorizontalFlip does: one ``torch.rand`` of the seed."""
        return probability > 0 and (self._torch_word() & 0xFFFFFF) * 2.0**-24 < probability

    def choose(self, count: int, size: int, weights: NDArray[np.float64] | None) -> list[int]:
        """Draw ``size`` of ``count`` things, as NumPy's ``choice``: without replacement where there are weights."""
        if weights is not None:
            return list(self._numpy.choice(count, size, replace=False, p=weights).tolist())
        mask = (1 << (count - 1).bit_length()) - 1
        chosen: list[int] = []
        while len(chosen) < size:
            if (drawn := self._numpy_word() & mask) < count:
                chosen.append(drawn)
        return chosen

    def _seed(self, seed: int) -> None:
        self.python.seed(seed)
        low = seed & 0xFFFFFFFF
        self._numpy.seed(low)
        self._torch.seed(low)


class _Local(threading.local):
    """The generators of each thread, reused because seeding is three times as fast as construction."""

    def __init__(self) -> None:
        self.draws = Draws()


_LOCAL = _Local()


def seeded_draws(seed: int) -> Draws:
    """Return this thread's generators, seeded; they are valid until the next call in this thread."""
    _LOCAL.draws._seed(seed)
    return _LOCAL.draws
