"""Targets and losses against hand-computed cases and against timm's own."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from rsb_cluster.config.recipe import Loss
from rsb_cluster.train.losses import criterion, targets

# Two images of four classes: one mixed 0.9 to 0.1 of classes 0 and 2, one of class 3 alone.
SHARES = torch.tensor([[0.9, 0.0, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0]])


def loss(**fields: Any) -> Loss:
    return Loss(**{"name": "bce", "targets": "paper"} | fields)


def test_paper_targets_are_one_for_each_class_mixed_in() -> None:
    assert targets(SHARES, loss()).tolist() == [[1, 0, 1, 0], [0, 0, 0, 1]]


def test_paper_targets_under_smoothing_are_one_minus_epsilon_and_epsilon_over_k() -> None:
    found = targets(SHARES, loss(smoothing=0.1))
    expected = torch.tensor([[0.9, 0.025, 0.9, 0.025], [0.025, 0.025, 0.025, 0.9]])
    torch.testing.assert_close(found, expected)


def test_paper_targets_keep_a_class_mixed_in_by_a_hair() -> None:
    shares = torch.tensor([[1 - 1e-6, 1e-6]])
    assert targets(shares, loss()).tolist() == [[1, 1]]
    assert targets(shares, loss(targets="timm", target_threshold=0.2)).tolist() == [[1, 0]]


def test_mixing_a_class_with_itself_gives_one_target() -> None:
    weights = mixup_target(torch.tensor([2, 2]), 4, lam=0.3)
    assert targets(weights, loss()).tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]


def test_deit_targets_equal_paper_targets_without_smoothing() -> None:
    """DeiT's engine.py: targets.gt(0.0)."""
    assert torch.equal(targets(SHARES, loss(targets="deit")), targets(SHARES, loss()))


def test_deit_targets_with_smoothing_are_refused_as_they_make_every_class_positive() -> None:
    with pytest.raises(ValueError, match="every class a positive"):
        loss(targets="deit", smoothing=0.1)


@pytest.mark.parametrize("lam", [0.05, 0.3, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_timm_style_equals_timms_own_loss(
    lam: float, smoothing: float, threshold: float | None, reduction: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (6,), generator=generator)
    logits = torch.randn(6, 7, generator=generator)
    theirs = BinaryCrossEntropy(smoothing=0, target_threshold=threshold, sum_classes=reduction == "sum")
    expected = theirs(logits, mixup_target(labels, 7, lam, smoothing))
    style = {"targets": "timm", "target_threshold": threshold} if threshold else {"targets": "soft"}
    ours = criterion(loss(smoothing=smoothing, reduction=reduction, **style))
    torch.testing.assert_close(ours(logits, mixup_target(labels, 7, lam)), expected)


def test_cross_entropy_equals_timms_soft_target_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    labels, logits = torch.randint(0, 7, (6,), generator=generator), torch.randn(6, 7, generator=generator)
    expected = SoftTargetCrossEntropy()(logits, mixup_target(labels, 7, 0.3, 0.1))
    ours = criterion(loss(name="ce", targets="soft", smoothing=0.1))
    torch.testing.assert_close(ours(logits, mixup_target(labels, 7, 0.3)), expected)


def test_bce_of_known_logits() -> None:
    """Logits 0 and ln 3 have probabilities 1/2 and 3/4; by hand: mean of ln 2 and ln(4/3)."""
    found = criterion(loss())(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.5, 0.5]]))
    assert found.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, rel=1e-6)
    summed = criterion(loss(reduction="sum"))(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.5, 0.5]]))
    assert summed.item() == pytest.approx(math.log(2) + math.log(4 / 3), rel=1e-6)


def test_losses_of_half_precision_logits_are_computed_in_single() -> None:
    logits = torch.tensor([[20.0, -20.0]], dtype=torch.float16)
    assert criterion(loss())(logits, torch.tensor([[1.0, 0.0]])).dtype == torch.float32


def test_timms_mixup_without_smoothing_gives_shares_that_show_both_classes() -> None:
    """What the trainer relies on: the shares from timm's Mixup are positive exactly for the classes mixed in."""
    np.random.seed(0)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=5)
    labels = torch.tensor([0, 1, 2, 3])
    for _ in range(20):
        _, weights = mixup(torch.rand(4, 3, 8, 8), labels)
        positive = targets(weights, loss())
        for row, (one, other) in enumerate(zip(labels.tolist(), labels.flip(0).tolist(), strict=True)):
            assert set(positive[row].nonzero().flatten().tolist()) <= {one, other}
            assert positive[row].sum() >= 1


def test_a_threshold_of_one_grey_level_leaves_out_a_partner_that_no_pixel_shows() -> None:
    shares = torch.tensor([[1 - 1 / 256, 1 / 256], [1 - 1 / 254, 1 / 254]])
    assert targets(shares, loss(target_threshold=1 / 255)).tolist() == [[1, 0], [1, 1]]
    assert targets(shares, loss()).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("name", ["bce", "ce"])
def test_a_loss_in_double_precision_stays_in_it(name: str) -> None:
    one = loss(name=name, targets="soft")
    logits = torch.tensor([[0.1, -0.2, 0.3, 0.4], [1.0, 2.0, -3.0, 0.0]], dtype=torch.float64)
    assert criterion(one)(logits, SHARES).dtype == torch.float64
    assert criterion(one)(logits.half(), SHARES).dtype == torch.float32
