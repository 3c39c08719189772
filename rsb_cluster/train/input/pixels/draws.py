"""The random numbers of a sample."""

from __future__ import annotations

import random
import threading

import numpy as np
import torch


class Draws:
    """The three generators that timm draws from, but of this thread alone.

    timm takes the flip from torch, the choice of operations from NumPy, and all else from Python. So does this, with
    the seeds of ``augment.seed_everything``: a seed means the same draws in both pipelines.
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
    """The generators of each thread: to seed one is three times as fast as to make one."""

    def __init__(self) -> None:
        self.draws = Draws()


_LOCAL = _Local()


def draws_of(seed: int) -> Draws:
    """Return this thread's generators, set to a seed; they are the caller's until this thread asks again."""
    _LOCAL.draws._seed(seed)
    return _LOCAL.draws
