"""A training's state as files: bit for bit what it was, readable by others, and copied once."""

import io
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rsb_cluster.errors import CheckpointError
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.checkpoint import Checkpoint, CheckpointId
from rsb_cluster.train.state import Progress, Staging, from_files, staged_bytes
from tests.equality import assert_bit_equal


def test_nothing_is_unpickled_that_could_run(tmp_path: Path) -> None:
    """A checkpoint whose checksums fit, by somebody who may write into the run's folder."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    buffer = io.BytesIO()
    torch.save({"weight": Evil()}, buffer)
    files = {"progress.json": b"{}", "model.safetensors": buffer.getvalue()}
    with pytest.raises(CheckpointError, match="the checkpoint of step 3 was not written by this version"):
        from_files(checkpoint.Checkpoint(CheckpointId(3, 1), files))
    assert not (tmp_path / "owned").exists()


CPU = torch.device("cpu")
DTYPES = [
    torch.float64, torch.int64, torch.float32, torch.int32, torch.float16, torch.bfloat16, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def returned(states: dict[str, Any], progress: Progress | None = None) -> tuple[Progress, dict[str, Any]]:
    """What is read of what was put."""
    files = {name: bytes(content) for name, content in Staging(CPU).put(progress or Progress(), states).items()}
    return from_files(Checkpoint(CheckpointId(3, 1), files))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    tensor = (values / 7).to(draw(st.sampled_from(DTYPES)))
    return tensor.permute(draw(st.permutations(range(len(shape)))))  # not all are contiguous


numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
states = st.recursive(
    tensors() | numbers,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers(0, 9) | st.text("abc", max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), states, max_size=3))
def test_any_state_comes_back_with_its_types_and_layouts(given_states: dict[str, Any]) -> None:
    _, found = returned(given_states)
    assert_bit_equal(found, given_states)
    for mine, theirs in zip(leaves(found), leaves(given_states), strict=True):
        assert type(mine) is type(theirs)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype
            assert mine.is_contiguous() == theirs.is_contiguous()
            if not mine.is_contiguous():
                assert mine.stride() == torch.empty_like(theirs).stride()


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *leaves(item))]
    if isinstance(value, list | tuple):
        return [type(value)(), *(leaf for item in value for leaf in leaves(item))]
    return [value]


def test_the_numbers_come_back() -> None:
    progress = Progress(step=7, train_s=0.1, interval_loss=1 / 3, best_step=5)
    assert returned({}, progress)[0] == progress


def test_others_can_read_the_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    content = bytes(Staging(CPU).put(Progress(), {"model": model.state_dict()})["model.safetensors"])
    assert_bit_equal(safetensors.torch.load(content), dict(model.state_dict()))


def test_what_was_put_does_not_change_when_training_goes_on() -> None:
    weights, staging = torch.zeros(1000), Staging(CPU)
    before = staging.put(Progress(), {"model": {"weight": weights}})["model.safetensors"]
    copy = bytes(before)
    weights += 1
    assert bytes(before) == copy


def test_the_next_save_takes_the_same_memory_although_its_header_is_longer() -> None:
    staging, weight = Staging(CPU), torch.zeros(1000)
    states = [{"model": {"weight": weight, "lr": [lr] * 10}} for lr in (0.1, 1 / 3, 1.0)]
    staging.reserve(staged_bytes(states[0]))
    contents = [staging.put(Progress(), state)["model.safetensors"] for state in states]
    assert len({torch.frombuffer(content, dtype=torch.uint8).data_ptr() for content in contents}) == 1


def test_two_tensors_of_one_name_and_what_has_no_place_in_a_file_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two tensors of a state have the name a\.b"):
        returned({"model": {"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}})
    with pytest.raises(TypeError, match=r"a state has a set, which cannot be saved: a\.0"):
        returned({"model": {"a": [{1, 2}]}})


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, b"\xff" * 64, (2).to_bytes(8, "little") + b"{}", safetensors.torch.save({"a": torch.zeros(3)})],
    ids=["empty", "short", "a header without end", "no tensors", "of another program"],
)
def test_another_file_is_no_state(content: bytes) -> None:
    files = {"progress.json": b"{}", "model.safetensors": content}
    with pytest.raises(CheckpointError, match="the checkpoint of step 3 was not written by this version"):
        from_files(Checkpoint(CheckpointId(3, 1), files))
