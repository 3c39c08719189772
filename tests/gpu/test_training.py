"""On a GPU: equal bits in deterministic mode, half precision, memory, what is measured. On a CPU: that this runs."""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
import timm
import torch

from rsb_cluster.config.catalog import load_job
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.data.make import make_set
from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.storage.store import Store
from rsb_cluster.train.data_wait import DataWait
from rsb_cluster.train.determinism import explain_refusal, set_determinism
from rsb_cluster.train.recomputation import Recomputation
from tests.equality import assert_bit_equal, final_state, rows_of
from tests.faults.lab import PACE, STEPS, Lab, StopAfter, few_digits

pytestmark = pytest.mark.gpu
DETERMINISTIC = ("train.deterministic=true", "train.channels_last=true")
# Images of 16 px are 1 x 1 in the last layers, where oneDNN's weight gradient in bf16 reads what nobody wrote on CPUs:
# of 300 gradients of a strided 3 x 3 convolution 148 were not finite (torch 2.15), of images of 32 px none.
LARGER = ("augment.resolution=32", "eval.resolution=32")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_set(few_digits(), Store(folder), shard_samples=50)
    return folder


@pytest.fixture(autouse=True)
def _any_kernels() -> Iterator[None]:
    yield
    set_determinism(False)


def lab_on(device: torch.device, folder: Path, digits: Path, *assignments: str) -> Lab:
    lab = Lab(folder, digits, *assignments)
    on_gpu = device.type == "cuda"
    overrides = [*PACE, f"gpus_per_node={int(on_gpu)}", "profile_steps=3-4"]
    lab.job, _ = load_job("local", overrides=parse_overrides(overrides))
    return lab


@pytest.mark.parametrize(
    ("amp", "optimizer"), [("off", "lamb"), ("fp16", "lamb"), ("bf16", "adamw"), ("fp16", "sgd"), ("off", "adamw")]
)
def test_a_preempted_run_is_bit_equal(
    tmp_path: Path, digits: Path, device: torch.device, amp: str, optimizer: str
) -> None:
    options = (
        *DETERMINISTIC, *LARGER, f"train.amp={amp}", f"optimizer.name={optimizer}", "optimizer.lr=0.005",
        "train.ema_decay=0.9", "augment.erase_prob=0.5", "model.drop_path_rate=0.1",
    )  # fmt: skip
    unbroken, broken = (lab_on(device, tmp_path / name, digits, *options) for name in ("unbroken", "broken"))
    assert unbroken.start() == "finished"
    assert broken.start(StopAfter(4)) == "preempted"
    assert broken.start() == "finished"
    if device.type == "cuda" or amp == "off":  # CPUs promise nothing in half precision
        assert_bit_equal(final_state(broken.run), final_state(unbroken.run))
        assert rows_of(broken.run) == rows_of(unbroken.run)
    losses = [row["loss"] for row in read_rows(unbroken.run) if row["kind"] == "train"]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))


def test_half_precision_learns_as_single_precision_does(tmp_path: Path, digits: Path, device: torch.device) -> None:
    means = {}
    for amp in ("off", "fp16", "bf16"):
        lab = lab_on(device, tmp_path / amp, digits, *DETERMINISTIC, *LARGER, f"train.amp={amp}")
        assert lab.start() == "finished"
        means[amp] = fmean(row["loss"] for row in read_rows(lab.run) if row["kind"] == "train")
    assert means == dict.fromkeys(means, pytest.approx(means["off"], rel=0.1))


def test_the_rows_and_the_profile_hold_what_a_gpu_did(tmp_path: Path, digits: Path, device: torch.device) -> None:
    lab = lab_on(device, tmp_path / "run", digits)
    assert lab.start() == "finished"
    rows = [row for row in read_rows(lab.run) if row["kind"] == "train"]
    assert all(row["step_s_p50"] > 0 for row in rows)
    (trace,) = (tmp_path / "run" / "profiles").iterdir()
    kinds = {event.get("cat") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "cpu_op" in kinds
    if device.type == "cuda":
        assert "kernel" in kinds
        assert all(row["gpu_memory_bytes"] > 1e6 for row in rows)
        pytest.importorskip("pynvml")
        assert sum(row["gpu_energy_j"] for row in rows) > 0


def test_gradient_checkpointing_gives_the_same_gradients_for_less_memory(device: torch.device) -> None:
    set_determinism(True)
    gradients, peaks = [], []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("resnet18" if device.type == "cuda" else "test_resnet").to(device).train()
        recomputation = Recomputation(model, enabled=enabled)
        images = torch.randn(64 if device.type == "cuda" else 2, 3, 160, 160, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = model(images).square().mean()
        with recomputation.backward():
            loss.backward()
        gradients.append([p.grad for p in model.parameters()] + list(model.buffers()))
        peaks.append(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)
        del loss, images, model
    assert_bit_equal(gradients[1], gradients[0])
    if device.type == "cuda":
        assert peaks[1] < 0.8 * peaks[0]


def test_an_operation_without_a_deterministic_kernel_is_named(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CPUs have a deterministic one")
    set_determinism(True)
    images = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    with pytest.raises(RuntimeError) as refused:
        torch.nn.functional.adaptive_avg_pool2d(images, 3).sum().backward()
    assert "adaptive_avg_pool2d_backward_cuda has no deterministic version" in explain_refusal(refused.value)


def test_waiting_for_data_is_measured_on_the_device(device: torch.device) -> None:
    wait = DataWait(device)
    work = torch.randn(512, 512, device=device)
    for _ in range(3):
        with wait.measure():
            pass
        work = work @ work / 512
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert 0 <= wait.take() < 60
