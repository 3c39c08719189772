"""A virtual rank that several processes share: each computes a part of its images as one process would the whole.

What couples the images of a micro-batch in a network is taken over, wherever the network calls it: the statistics of
BatchNorm are those of the whole virtual rank, and random numbers are drawn for all of its images, of which a process
takes its own. So its processes have the generator in the same state before each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.modules._functions import SyncBatchNorm
from torch.overrides import TorchFunctionMode, resolve_name

from rsb_cluster.errors import ConfigError


class SharedVirtualRank(TorchFunctionMode):
    """While it is active, what a network computes of a part is what it would compute of the whole virtual rank.

    It is active during the forward pass only; the backward pass of BatchNorm finds its group by itself. The network's
    modules stay as they are, so that states, copies (the moving average) and evaluation know nothing of it.

    Args:
        slots: This process's images of the micro-batch, as positions in it, in order.
        micro_batch: Images of the whole micro-batch, m.
        group: The processes that share the virtual rank, with equal numbers of images; None: this one computes it in
            parts, one after the other, which a network with BatchNorm cannot.
        checks: Whether to refuse functions that draw random numbers and are not taken over. It costs time: for the
            first pass.
    """

    def __init__(
        self, slots: Sequence[int], micro_batch: int, group: dist.ProcessGroup | None, *, checks: bool = False
    ) -> None:
        super().__init__()
        self._slots, self._micro_batch, self._group = list(slots), micro_batch, group
        self._parts = dist.get_world_size(group) if group is not None else 1
        self._checks = checks
        self._handlers: dict[Any, Callable[..., Tensor]] = {
            F.batch_norm: self._batch_norm,
            F.dropout: self._dropout,
            Tensor.bernoulli_: self._bernoulli_,
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = self._handlers.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        if not self._checks:
            return func(*args, **(kwargs or {}))
        before = _generators()
        result = func(*args, **(kwargs or {}))
        if any(not torch.equal(a, b) for a, b in zip(before, _generators(), strict=True)):
            raise self._refusal(f"draws random numbers with {resolve_name(func) or func}")
        return result

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        is_of_weights = running_mean is None and len(input) == 1 and len(self._slots) > 1  # weight standardisation
        if not training or is_of_weights:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if self._group is None:
            raise self._refusal("has BatchNorm")
        if running_mean is None or running_var is None:
            raise self._refusal("has BatchNorm without running statistics")
        function = SyncBatchNorm if input.device.type == "cuda" else SharedBatchNorm
        result: Tensor = function.apply(
            input, weight, bias, running_mean, running_var, eps, momentum, self._group, self._parts
        )
        return result

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or not p:
            return F.dropout(input, p, training, inplace)
        mask = F.dropout(self._whole(input).fill_(1), p)[self._slots]
        return input.mul_(mask) if inplace else input * mask

    def _bernoulli_(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(self._whole(input).bernoulli_(*args, **kwargs)[self._slots])

    def _whole(self, part: Tensor) -> Tensor:
        """Return an empty tensor of all images in the memory layout of a part: numbers are drawn in its order."""
        if len(part) != len(self._slots):
            raise self._refusal(f"draws random numbers for {len(part)} items, and not one for each image")
        strides = part.stride()
        order = sorted(range(part.dim()), key=lambda d: -strides[d])
        shape = [self._micro_batch, *part.shape[1:]]
        whole = part.new_empty([shape[d] for d in order])
        return whole.permute([order.index(d) for d in range(part.dim())])

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(
            f"several processes cannot share a virtual rank of this network: it {why}. Use at most as many processes "
            "as virtual ranks; or use more --virtual-ranks, which is another run."
        )


def _generators() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


class SharedBatchNorm(Function):
    """BatchNorm over the images of several processes, on the CPU, where torch has none.

    Each gives count, mean and sum of squared deviations M2 of its images; the parts are merged in the order of the
    processes, so that all get the same numbers to the last bit. Never by E[x²] - E[x]², which loses all digits where
    the mean is large.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        momentum: float,
        group: dist.ProcessGroup,
        parts: int,
    ) -> Tensor:
        """Normalise; the arguments are those of torch's ``SyncBatchNorm`` function."""
        x = input.to(running_mean.dtype)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        mean = x.mean(dims)
        m2 = (x - mean.view(shape)).square().sum(dims)
        count = torch.full((1,), x.numel() // x.shape[1], dtype=x.dtype)
        means, m2s, counts = _gather(torch.cat([mean, m2, count]), group, parts).split([len(mean), len(mean), 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        m2 = (m2s + counts * (means - mean).square()).sum(0)
        inverse = (m2 / total + eps).rsqrt()
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(m2 / (total - 1), alpha=momentum)
        ctx.save_for_backward(input, weight, mean, inverse, total)
        ctx.group, ctx.parts = group, parts
        result = (x - mean.view(shape)) * inverse.view(shape)
        if weight is not None:
            result = result * weight.view(shape)
        if bias is not None:
            result = result + bias.view(shape)
        output: Tensor = result.to(input.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of a part: of weight and bias by its own images, which DDP averages."""
        input, weight, mean, inverse, total = ctx.saved_tensors
        shape = [1, -1, *[1] * (input.dim() - 2)]
        dims = [0, *range(2, input.dim())]
        dy = grads[0].to(mean.dtype)
        normalised = (input.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        sums = torch.cat([dy.sum(dims), (dy * normalised).sum(dims)])
        both = _gather(sums, ctx.group, ctx.parts).sum(0) / total
        mean_dy, mean_dy_normalised = (part.view(shape) for part in both.chunk(2))
        scale = inverse if weight is None else inverse * weight
        dx = (dy - mean_dy - normalised * mean_dy_normalised) * scale.view(shape)
        of_bias, of_weight = sums.chunk(2)
        needs = ctx.needs_input_grad
        return (
            dx.to(input.dtype) if needs[0] else None,
            of_weight if needs[1] else None,
            of_bias if needs[2] else None,
            *[None] * 6,
        )


def _gather(numbers: Tensor, group: dist.ProcessGroup, parts: int) -> Tensor:
    """Return the numbers of all processes of a group, shape (parts, N), in the order of the processes."""
    gathered = [torch.empty_like(numbers) for _ in range(parts)]
    dist.all_gather(gathered, numbers, group=group)
    return torch.stack(gathered)
