"""Scores: counted on the device, where the host reads nothing before the end."""

from __future__ import annotations

import torch

from rsb_cluster.train.input.loader import Batch
from rsb_cluster.train.validation.validate import _counts


def batch() -> Batch:
    return Batch(
        images=torch.zeros(4, 3, 2, 2, dtype=torch.uint8),
        labels=torch.tensor([0, 1, 2, 6]),
        samples=torch.arange(4),
        good=torch.tensor([True, True, True, False]),
    )


def test_an_image_that_is_not_decoded_is_wrong_and_has_no_loss() -> None:
    logits = torch.eye(7)[[0, 5, 0, 6]] * 10 + torch.arange(7.0)
    hits1, hits5, loss, images, bad = _counts(batch(), logits).tolist()
    assert (hits1, hits5, images, bad) == (1, 1, 4, 1)
    losses = torch.nn.functional.cross_entropy(logits[:3], batch().labels[:3], reduction="none")
    assert loss == float(losses.double().sum())


def test_no_value_is_read_and_none_is_copied_from_a_number_of_the_host() -> None:
    """On torch's device without memory there is nothing to read."""
    counts = _counts(batch(), torch.zeros(4, 7, device="meta"))
    assert counts.device.type == "meta" and counts.shape == (5,)
