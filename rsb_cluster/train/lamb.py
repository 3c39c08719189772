"""LAMB in a number of kernels that does not grow with the network, and without a wait of the host.

timm's update, in the form of its ``Lamb`` with gradient averaging and bias correction. Adam's part of it (unscaling and
clipping the gradient, both moments, the direction) is one pass of torch's fused Adam, over a network of zeros in place
of the parameters, with a learning rate of -1: it leaves the direction there. The trust ratios are norms of lists, and
one multiplication spreads them. A step in which half precision overflowed is masked on the device: torch's kernel reads
``found_inf`` there, and the learning rate is multiplied by zero; the host need not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lamb
from torch import Tensor

# A direction begins at a multiple of so many elements: then one factor a row spreads a trust ratio over it.
_ROW = 256


class FusedLamb(Lamb):
    """timm's LAMB, its update computed by torch's fused Adam kernel.

    A state that an earlier version saved has no ``fused`` in its groups. It goes on with the arithmetic that wrote it
    (timm's, with its loop where timm had no other), as a resume changes no bit.

    Args:
        params: Parameters, or groups of them as timm makes them; of one floating type, dense.
        options: As timm's ``Lamb``, but for ``bias_correction``, ``grad_averaging``, ``caution``, ``decoupled_decay``
            and ``foreach``, which have timm's defaults.
    """

    grad_scale: Tensor | None  # set by GradScaler for a step, as for torch's fused optimizers
    found_inf: Tensor | None

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self._directions: dict[int, _Directions] = {}
        for group in self.param_groups:
            group["fused"] = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            if not group.setdefault("fused", False):
                group.setdefault("foreach", False)
        super().__setstate__(state)
        self._directions = {}
        for group in self.param_groups:
            if group["fused"] and "step" in group:
                group["step"] = group["step"].to(group["params"][0].device)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling and the mask to this optimizer, and does not wait for ``found_inf``."""
        return all(group["fused"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do a step; the learning rate of a group is a number of the host."""
        if not self._step_supports_amp_scaling:
            return super().step(closure)  # type: ignore[no-any-return]
        loss = closure() if closure is not None else None
        scale, overflow = (  # GradScaler's have one element, and one dimension or none
            None if value is None else value.reshape(())
            for value in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        divisor = self._divisor(scale)
        if divisor is not None and divisor.dtype == torch.float64:  # the kernel divides by single precision only
            torch._foreach_div_([p.grad for g in self.param_groups for p in g["params"] if p.grad is not None], divisor)
            divisor = None
        groups = {}
        for number, group in enumerate(self.param_groups):
            if parameters := [p for p in group["params"] if p.grad is not None]:
                groups[number] = parameters
                if "step" not in group:
                    group["step"] = torch.zeros((), dtype=torch.float32, device=parameters[0].device)
        if not groups:
            return loss
        counts = [self.param_groups[number]["step"] for number in groups]
        kept = None if overflow is None else 1.0 - overflow  # 0 where the step is to have no effect
        if kept is None:
            torch._foreach_add_(counts, 1.0)
        else:
            torch._foreach_add_(counts, [kept] * len(counts))
        for number, parameters in groups.items():
            self._update(number, parameters, divisor, overflow, kept)
        return loss

    def _divisor(self, scale: Tensor | None) -> Tensor | None:
        """Return what the gradients are to be divided by: the loss scale, and the clip of their global norm."""
        limit = self.defaults["max_grad_norm"]
        gradients: list[Tensor] = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if limit is None or not gradients:
            return scale
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        clip = norm if limit == 1.0 else norm / limit
        return clip.clamp_(min=1.0) if scale is None else torch.maximum(clip, scale)

    def _update(
        self,
        number: int,
        parameters: list[Tensor],
        divisor: Tensor | None,
        overflow: Tensor | None,
        kept: Tensor | None,
    ) -> None:
        group = self.param_groups[number]
        directions = self._directions.get(number)
        if directions is None or not directions.fits(parameters):
            directions = self._directions[number] = _Directions.like(parameters)
        directions.rows.zero_()
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        beta1, beta2 = group["betas"]
        torch._fused_adam_(
            directions.parts,
            [p.grad for p in parameters],  # type: ignore[misc]
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            [group["step"]] * len(parameters),
            lr=-1.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False,
            grad_scale=divisor, found_inf=overflow,
        )  # fmt: skip
        if group["weight_decay"]:
            torch._foreach_add_(directions.parts, parameters, alpha=group["weight_decay"])
        if group["weight_decay"] or group["always_adapt"]:
            rates = _trust_ratios(parameters, directions.parts, clip=group["trust_clip"]).mul_(-group["lr"])
            if kept is not None:
                rates.mul_(kept)
            directions.rows.mul_(rates.index_select(0, directions.owners)[:, None])
            torch._foreach_add_(parameters, directions.parts)
        else:  # where the step overflowed, the kernel left zeros
            torch._foreach_add_(parameters, directions.parts, alpha=-group["lr"])


@dataclass(frozen=True, eq=False)
class _Directions:
    """Room for the direction of each parameter, in one piece of memory.

    Attributes:
        rows: All of it, shape (R, 256).
        owners: The number of the parameter that a row belongs to, shape (R,).
        parts: Views of it, with the shape and strides of the parameters, as the kernels want lists of one layout.
    """

    rows: Tensor
    owners: Tensor
    parts: list[Tensor]

    @classmethod
    def like(cls, parameters: Sequence[Tensor]) -> _Directions:
        """Return room for some parameters."""
        counts = [math.ceil(p.numel() / _ROW) for p in parameters]
        device = parameters[0].device
        rows = torch.zeros(sum(counts), _ROW, dtype=parameters[0].dtype, device=device)
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        starts = [_ROW * sum(counts[:i]) for i in range(len(counts))]
        parts = [
            rows.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), start)
            for p, start in zip(parameters, starts, strict=True)
        ]
        return cls(rows, owners.to(device), parts)

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether this is room for these parameters."""
        return [part.shape for part in self.parts] == [p.shape for p in parameters]


def _trust_ratios(parameters: list[Tensor], directions: list[Tensor], *, clip: bool) -> Tensor:
    """Return the ratio of the norms of each parameter and its direction; 1 where one is 0, and at most 1 with clip."""
    norms_2P = torch.stack(torch._foreach_norm([*parameters, *directions])).view(2, -1)
    ratios_P = torch.where((norms_2P > 0).all(0), norms_2P[0] / norms_2P[1], 1.0)
    return ratios_P.clamp_(max=1.0) if clip else ratios_P
