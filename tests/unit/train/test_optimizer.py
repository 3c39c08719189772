"""The optimizers: timm's arithmetic, one state whatever is resumed, and no wait of the host."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import Lamb
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rsb_cluster.config.recipe import Optimizer
from rsb_cluster.train.lamb import FusedLamb
from rsb_cluster.train.optimizer import build_optimizer, load_optimizer
from tests.equality import assert_bit_equal

SPECS = {
    "lamb": Optimizer(name="lamb", lr=5e-3, weight_decay=0.02),
    "lamb, clip off": Optimizer(name="lamb", lr=5e-3, weight_decay=0.02, lamb_max_grad_norm=0.0),
    "lamb, all decay": Optimizer(name="lamb", lr=5e-3, weight_decay=0.02, decay_norm_and_bias=True),
    "adamw": Optimizer(name="adamw", lr=1e-3, weight_decay=0.05),
    "sgd": Optimizer(name="sgd", lr=0.05, weight_decay=1e-4),
}


def network(device: str = "cpu") -> nn.Module:
    """Layers of all the kinds of parameters: 1 × 1 and 3 × 3 in both layouts, a matrix, vectors, odd sizes."""
    torch.manual_seed(0)
    with torch.device(device):
        layers = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 5, 1),
            nn.Conv2d(5, 3, 3),
            nn.Flatten(),
            nn.Linear(48, 7),
        )
    if device == "cpu":
        for layer in (layers[0], layers[2]):
            layer.to(memory_format=torch.channels_last)
    nn.init.zeros_(layers[1].weight)  # as the last of a residual block; its trust ratio is 1
    return layers


def give_gradients(model: nn.Module, step: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        # In the layout of the parameter, as autograd has it.
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator) * factor)


def timms(model: nn.Module, spec: Optimizer, **options: Any) -> Lamb:
    groups = [
        {"params": [*g["params"]], "weight_decay": g["weight_decay"]} for g in build_optimizer(model, spec).param_groups
    ]
    return Lamb(groups, lr=spec.lr, eps=spec.eps, max_grad_norm=spec.lamb_max_grad_norm or None, **options)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", [name for name in SPECS if name.startswith("lamb")])
def test_lamb_is_timms_in_both_of_its_forms(name: str, foreach: bool) -> None:
    ours, theirs = network(), network()
    fused, reference = build_optimizer(ours, SPECS[name]), timms(theirs, SPECS[name], foreach=foreach)
    for step in range(20):
        give_gradients(ours, step, factor=0.1 if step % 2 else 10.0)  # clipped in every other step
        give_gradients(theirs, step, factor=0.1 if step % 2 else 10.0)
        for optimizer in (fused, reference):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (step + 1)
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-6)
        moments = zip(fused.state[mine].values(), reference.state[other].values(), strict=True)
        for moment, its in moments:
            torch.testing.assert_close(moment, its, rtol=2e-5, atol=1e-6)


class NoSync(TorchDispatchMode):
    """Fails where a value of a device is read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        return func(*args, **kwargs or {})


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscaled before, as clipping does"])
def test_a_step_that_overflowed_is_masked_without_a_word_to_the_host(spec: Optimizer, unscaled: bool) -> None:
    model, plain = network(), network()
    optimizer, reference = build_optimizer(model, spec), build_optimizer(plain, spec)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))  # creates its tensors

    def scaled_step(factor: float) -> None:
        if unscaled:
            scaler.unscale_(optimizer)
        with NoSync():
            scaler.step(optimizer)
            scaler.update()

    give_gradients(model, 0)
    next(model.parameters()).grad[0, 0, 0, 0] = torch.inf  # type: ignore[index]
    before = bits(model, optimizer)
    scaled_step(1.0)
    after = bits(model, optimizer)
    if spec.name == "lamb":
        assert all(group.pop("step") == 0 for group in after["optimizer"]["param_groups"])
    assert_bit_equal(after["model"], before["model"])
    for state in after["optimizer"]["state"].values():
        assert all(not value.any() for value in state.values()), "moments, and counters, are as at the start"
    assert scaler.get_scale() == 2.0**9
    for step in range(1, 4):
        give_gradients(model, step, factor=2.0**9)
        give_gradients(plain, step)
        scaled_step(2.0**9)
        reference.step()
    assert_bit_equal(bits(model, optimizer), bits(plain, reference))  # scales are powers of two


def loop_of_an_older_timm(model: nn.Module) -> torch.optim.Optimizer:
    return timms(model, SPECS["lamb"], foreach=False)


OLD: dict[str, tuple[str, Callable[[nn.Module], torch.optim.Optimizer], tuple[str, ...]]] = {
    "timm before it had lists": ("lamb", loop_of_an_older_timm, ("foreach",)),
    "timm's choice": ("lamb", lambda model: timms(model, SPECS["lamb"]), ()),
    "timm with lists": ("lamb", lambda model: timms(model, SPECS["lamb"], foreach=True), ()),
    "torch's AdamW": ("adamw", lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05), ()),
    "torch's SGD": ("sgd", lambda model: torch.optim.SGD(model.parameters(), 0.05, 0.9, nesterov=True), ()),
}


@pytest.mark.parametrize("old", OLD.values(), ids=OLD.keys())
def test_a_state_of_an_earlier_version_goes_on_with_the_arithmetic_that_wrote_it(old: Any) -> None:
    name, create, dropped = old
    model, resumed = network(), network()
    optimizer = create(model)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in dropped:
            del group[key]
    resumed.load_state_dict(model.state_dict())
    spec = SPECS[name]
    if name != "lamb":  # one group, as these were created above
        spec = spec.model_copy(update={"decay_norm_and_bias": True})
    ours = build_optimizer(resumed, spec)
    load_optimizer(ours, state)
    # Nor does GradScaler leave to them what they cannot do.
    assert not ours._step_supports_amp_scaling  # type: ignore[attr-defined]
    for step in range(3, 6):
        for m, o in ((model, optimizer), (resumed, ours)):
            give_gradients(m, step)
            o.step()
    assert_bit_equal(dict(resumed.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd"])
def test_a_resumed_state_is_bit_equal_and_stays_fused(name: str) -> None:
    model, resumed = network(), network()
    optimizer = build_optimizer(model, SPECS[name])
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    ours = build_optimizer(resumed, SPECS[name])
    resumed.load_state_dict(model.state_dict())
    load_optimizer(ours, copy.deepcopy(optimizer.state_dict()))
    assert ours._step_supports_amp_scaling  # type: ignore[attr-defined]
    for step in range(3, 6):
        for m, o in ((model, optimizer), (resumed, ours)):
            give_gradients(m, step)
            o.step()
    assert_bit_equal(bits(resumed, ours), bits(model, optimizer))


def counters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    own = [state["step"] for state in optimizer.state.values() if "step" in state]
    return own + [group["step"] for group in optimizer.param_groups if "step" in group]


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_step_counters_are_loaded_to_where_the_kernels_read_them(name: str) -> None:
    """A kernel reads them on the GPU; a loop or a list reads each on the host, and one on the GPU is a wait."""
    fused, old = network(), network()
    writers = [
        build_optimizer(fused, SPECS[name]),
        timms(old, SPECS["lamb"]) if name == "lamb" else torch.optim.AdamW(old.parameters()),
    ]
    states = []
    for model, writer in zip((fused, old), writers, strict=True):
        give_gradients(model, 0)
        writer.step()
        states.append(copy.deepcopy(writer.state_dict()))
    spec = SPECS[name]
    devices = []
    for state, every in zip(states, (False, name == "adamw"), strict=True):
        ours = build_optimizer(network("meta"), spec.model_copy(update={"decay_norm_and_bias": every}))
        load_optimizer(ours, state)
        assert all(s["exp_avg"].device.type == "meta" for s in ours.state.values())
        assert counters(ours)
        devices.append({counter.device.type for counter in counters(ours)})
    assert devices == [{"meta"}, {"cpu"}]


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    model = network()
    optimizer = build_optimizer(model, SPECS["lamb"])
    assert isinstance(optimizer, FusedLamb)
    give_gradients(model, 0)
    model[0].bias.grad = None  # type: ignore[union-attr, operator]
    before = copy.deepcopy(model[0].state_dict())  # type: ignore[index, operator]
    optimizer.step()
    assert torch.equal(model[0].bias, before["bias"]) and not torch.equal(model[0].weight, before["weight"])  # type: ignore[arg-type, operator]
