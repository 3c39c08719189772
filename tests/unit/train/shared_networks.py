"""Whether parts of a micro-batch on several processes are the whole: a program that forks them.

``python -m tests.unit.train.shared_networks CASE`` exits with 0 if they are; `CASES` has them by name.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rsb_cluster.data.global_batch import GlobalBatch
from rsb_cluster.errors import ConfigError
from rsb_cluster.train.augment import Mix, seed_everything
from rsb_cluster.train.shared_rank import SharedVirtualRank
from tests.unit.bundled import load_recipe
from tests.unit.train.forking import fork

PARTS, IMAGES = 4, 16


def _slots(rank: int) -> tuple[int, ...]:
    return GlobalBatch(1, IMAGES, mixes=True).share(rank, PARTS).slots


def _images(offset: float = 0.0, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, side, side, generator=generator, dtype=torch.float64) * 3 + offset


def _shared(rank: int, *, checks: bool = False) -> SharedVirtualRank:
    group = dist.group.WORLD
    assert group is not None
    return SharedVirtualRank(_slots(rank), IMAGES, group, checks=checks)


def _passes(network: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, gradients of the mean of their squares, and buffers after a pass in training mode."""
    seed_everything(7)
    out = network.train()(images)
    out.square().mean().backward()
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return out.detach(), grads, dict(network.named_buffers())


def equal(
    make: Callable[[], nn.Module], offset: float = 0.0, side: int = 16, tolerance: float = 1e-11
) -> Callable[[int], None]:
    """A case: outputs, gradients and statistics of a network are those of one process, to rounding."""

    def check(rank: int) -> None:
        images = _images(offset, side)
        torch.manual_seed(0)
        whole = make().double()
        part = make().double()
        part.load_state_dict(whole.state_dict())
        out, grads, buffers = _passes(whole, images)
        with _shared(rank):
            out_part, grads_part, buffers_part = _passes(part, images[list(_slots(rank))])
        torch.testing.assert_close(out_part, out[list(_slots(rank))], rtol=tolerance, atol=tolerance)
        assert grads_part.keys() == grads.keys()
        for name, grad in grads_part.items():
            dist.all_reduce(grad)  # as DDP does
            torch.testing.assert_close(grad / PARTS, grads[name], rtol=100 * tolerance, atol=tolerance, msg=name)
        for name, buffer in buffers_part.items():
            torch.testing.assert_close(buffer, buffers[name], rtol=tolerance, atol=tolerance, msg=name)
            both = [torch.empty_like(buffer) for _ in range(PARTS)]
            dist.all_gather(both, buffer)
            assert all(torch.equal(one, buffer) for one in both), f"{name} differs between processes"

    return check


class Odd(nn.Module):
    """What else couples or draws: other shapes, dropout in place and on transposed tokens, no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.BatchNorm1d(8)
        self.plain = nn.BatchNorm2d(3, affine=False, momentum=None)
        self.line = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x)
        tokens = F.dropout(x.flatten(2).transpose(1, 2), 0.3, self.training)  # not contiguous
        tokens = self.line(tokens)
        tokens = self.rows(tokens.flatten(0, 1)).reshape(tokens.shape)  # more rows than images
        return F.dropout(tokens.mean(1), 0.5, self.training, inplace=True)


def refuses(make: Callable[[], nn.Module], message: str) -> Callable[[int], None]:
    """A case: a network that cannot be shared is refused by the name of what it does."""

    def check(rank: int) -> None:
        try:
            with _shared(rank, checks=True):
                make().double().train()(_images()[list(_slots(rank))])
        except ConfigError as error:
            assert message in str(error), error
        else:
            raise AssertionError("not refused")

    return check


class Draws(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self._draw(x)


def mixes_and_erases(rank: int) -> None:
    """λ, boxes, partners and erased pixels of a part are those of the whole, for many draws."""
    recipe = load_recipe("a1", "augment.erase_prob=0.5", "data.num_classes=10", "augment.mix_prob=0.8")
    labels, slots = torch.arange(IMAGES) % 10, list(_slots(rank))
    cpu = torch.device("cpu")
    whole, part = Mix(recipe, cpu), Mix(recipe, cpu, slots, IMAGES)
    for seed in range(40):
        images = _images()
        seed_everything(seed)
        mixed, shares = whole(images.clone(), labels)
        seed_everything(seed)
        mixed_part, shares_part = part(images[slots].clone(), labels[slots])
        assert torch.equal(mixed_part, mixed[slots]) and torch.equal(shares_part, shares[slots])


CASES: dict[str, Callable[[int], None]] = {
    "resnet with drops": equal(lambda: timm.create_model("test_resnet", drop_rate=0.3, drop_path_rate=0.3)),
    "BatchNormAct": equal(lambda: timm.create_model("test_efficientnet", drop_rate=0.3, drop_path_rate=0.3), side=32),
    "standardised weights": equal(lambda: timm.create_model("test_nfnet"), side=32),
    "vit with drops": equal(
        lambda: timm.create_model("test_vit", img_size=32, drop_rate=0.1, drop_path_rate=0.2, pos_drop_rate=0.1),
        side=32,
    ),
    "odd": equal(Odd),
    # The mean is a million times the deviation: of E[x²] - E[x]² four digits would be left.
    "far from zero": equal(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), offset=3e6, tolerance=1e-8),
    "mixes and erases": mixes_and_erases,
    "refuses noise": refuses(lambda: Draws(lambda x: x + torch.randn_like(x)), "draws random numbers with torch.randn"),
    "refuses other shapes": refuses(
        lambda: Draws(lambda x: F.dropout(x.transpose(0, 1), 0.5)), "for 3 items, and not one for each image"
    ),
    "refuses no statistics": refuses(
        lambda: nn.BatchNorm2d(3, track_running_stats=False), "without running statistics"
    ),
}


def _rank(rank: int, folder: str, check: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PARTS)
    check(rank)


def main(name: str) -> int:
    """Fork the processes of a case; return 0 if all of them found what they should."""
    with tempfile.TemporaryDirectory() as folder:
        return int(not fork(PARTS, lambda rank: _rank(rank, folder, CASES[name])))


if __name__ == "__main__":
    failed = [name for name in sys.argv[1:] or CASES if main(name)]
    print("failed:", ", ".join(failed) or "none")
    sys.exit(bool(failed))
