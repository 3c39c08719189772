"""The random generators of a sample."""

from __future__ import annotations

import random
import threading

import numpy as np
import torch


class Draws:
    """The three generators that timm draws from, local to a thread.

    timm draws the flip from torch, the choice of operations from NumPy, and all else from Python. This class does the
    same, with the seeds of ``augment.seed_everything``, so a seed gives the same draws in both pipelines.
    """

    def __init__(self) -> None:
        self.python = random.Random()
        self.numpy = np.random.RandomState()
        self._torch = torch.Generator()

    def flips(self, probability: float) -> bool:
        """Draw whether to flip, as torchvision's RandomHorizontalFlip does."""
        return probability > 0 and torch.rand(1, generator=self._torch).item() < probability

    def _seed(self, seed: int) -> None:
        self.python.seed(seed)
        self.numpy.seed(seed % 2**32)
        self._torch.manual_seed(seed % 2**63)


class _Local(threading.local):
    """The generators of each thread, reused because seeding is three times as fast as construction."""

    def __init__(self) -> None:
        self.draws = Draws()


_LOCAL = _Local()


def seeded_draws(seed: int) -> Draws:
    """Return this thread's generators, seeded; they are valid until the next call in this thread."""
    _LOCAL.draws._seed(seed)
    return _LOCAL.draws
