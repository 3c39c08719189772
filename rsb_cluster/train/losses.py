"""Targets and losses. Legend: B images, K classes.

The paper's BCE treats every class mixed into an image as present. No published code does that for A1 (with smoothing):
timm and DeiT threshold smoothed targets. So the paper's targets are implemented here, and theirs can be chosen by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rsb_cluster.config.recipe import Loss


def smooth(weights_BK: Tensor, smoothing: float) -> Tensor:
    """Return label-smoothed weights: ``(1 − ε)·w + ε/K``; rows keep their sum of 1.

    Source: timm, ``data/mixup.py::mixup_target``; Szegedy et al. 2015 (arXiv:1512.00567) sec. 7.
    """
    return weights_BK * (1 - smoothing) + smoothing / weights_BK.shape[1] if smoothing else weights_BK


def targets(weights_BK: Tensor, loss: Loss) -> Tensor:
    """Turn the share that each class has in an image into the target of the loss.

    Args:
        weights_BK: Share of each class in each mixed image, from Mixup or CutMix without smoothing; rows sum to 1.
            An image that was not mixed has a single 1.
        loss: Names the style: ``paper``, ``soft``, ``timm`` or ``deit``.

    Returns:
        Targets, shape (B, K): for ``paper`` 1 − ε for each class mixed in (with a share above the threshold, which is
        0 by default) and ε/K for all others; for ``soft`` the
        smoothed shares; for ``timm`` 1 where a smoothed share exceeds the threshold, else 0; for ``deit`` the same
        with threshold 0.

    Source: Wightman et al. 2021 (arXiv:2110.00476) sec. 2; timm ``loss/binary_cross_entropy.py``; DeiT ``engine.py``.
    """
    if loss.targets == "paper":
        present_BK = weights_BK > loss.target_threshold
        on, off = 1 - loss.smoothing, loss.smoothing / weights_BK.shape[1]
        return torch.where(present_BK, on, off).to(weights_BK.dtype)
    soft_BK = smooth(weights_BK, loss.smoothing)
    if loss.targets == "soft":
        return soft_BK
    return soft_BK.gt(loss.target_threshold).to(weights_BK.dtype)


def criterion(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of logits (B, K) against shares (B, K): one number, the mean over images.

    BCE is averaged or summed over classes, as ``loss.reduction`` says.
    """

    def bce(logits_BK: Tensor, weights_BK: Tensor) -> Tensor:
        wide_BK = _widen(logits_BK)
        targets_BK = targets(weights_BK, loss).to(wide_BK.dtype)
        per_class_BK = F.binary_cross_entropy_with_logits(wide_BK, targets_BK, reduction="none")
        return (per_class_BK.mean(1) if loss.reduction == "mean" else per_class_BK.sum(1)).mean()

    def cross_entropy(logits_BK: Tensor, weights_BK: Tensor) -> Tensor:
        wide_BK = _widen(logits_BK)
        return F.cross_entropy(wide_BK, targets(weights_BK, loss).to(wide_BK.dtype))

    return bce if loss.name == "bce" else cross_entropy


def _widen(logits_BK: Tensor) -> Tensor:
    return logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float()
