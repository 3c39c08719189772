"""scikit-learn's digits: real data without a download."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from rsb_cluster.data.order import permutation
from rsb_cluster.data.sources.source import SHUFFLE_SEED, SPLITS, DataSource, Sample, as_png
from rsb_cluster.errors import ConfigError

DIGITS_VAL_SAMPLES = 359  # of 1,797: a fifth


def digits(split: str) -> DataSource:
    """Open scikit-learn's digits: 1,797 grey images of 8 × 8 pixels, 10 classes, part of the package.

    Values 0 to 16 are scaled to 0 to 255. A fixed fifth of each class is val: 359 images; 1,438 are train.

    Raises:
        ConfigError: The split is neither ``train`` nor ``val``.
    """
    if split not in SPLITS:
        raise ConfigError(f"digits has no split '{split}'. It has: {', '.join(SPLITS)}.")
    _, labels = _load()
    # Sorted by class, shuffled within it: every fifth place is then a random fifth of each class, to within one.
    order = permutation(len(labels), SHUFFLE_SEED)
    order = order[np.argsort(labels[order], kind="stable")]
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[order[2::5]] = True
    assert is_val.sum() == DIGITS_VAL_SAMPLES
    numbers = np.flatnonzero(is_val if split == "val" else ~is_val).tolist()
    return DataSource(f"scikit-learn's digits, {split}", tuple("0123456789"), numbers, _read, class_of=_class_of)


def _read(number: int) -> Sample:
    from PIL import Image

    images, labels = _load()
    return f"digits-{number:04d}", as_png(Image.fromarray(images[number])), "png", int(labels[number])


def _class_of(number: int) -> int:
    return int(_load()[1][number])


@cache
def _load() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    return np.rint(values.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), labels
