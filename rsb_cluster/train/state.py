"""The state of a training as files: plain numbers as JSON, each state dict as one file in the safetensors format.

That format stores tensors as they are in memory, so a save is one copy into host memory: the copy is the file. Reading
unpickles nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rsb_cluster.config.schema import newer_version
from rsb_cluster.errors import CheckpointError
from rsb_cluster.runs import checkpoint

_SUFFIX = ".safetensors"
_DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# Alignment of files in the staging memory, bytes, enough for all types of numbers.
_ALIGNMENT = 64
# Headroom of the staging memory, bytes, as the numbers in a header get longer during training.
_HEADROOM = 1 << 20


@dataclass
class Progress:
    """The progress of a training: the part of its state that is plain numbers.

    Attributes:
        step: Optimizer steps done.
        evaluated_step: Step of the last complete evaluation.
        bad_samples: Images of the current epoch so far that could not be decoded.
        train_s: Seconds spent in the steps done, over all attempts.
        interval_loss: Sum of the losses since the last metrics row, so a resume leaves no trace in the rows.
        interval_wait_s: Seconds that a device lost to waiting for data since the last metrics row.
        interval_bytes: Bytes read from the store since the last metrics row.
        interval_steps: Steps since the last metrics row.
        best_top1: Best top-1 of an evaluation so far, percent; negative before the first.
        best_step: Step of the best evaluation.
        scores: Scores of the last complete evaluation, as plain values, by prefix; an attempt that has nothing left to
            train writes the result from them. Empty in checkpoints of versions that did not store them.
    """

    step: int = 0
    evaluated_step: int = 0
    bad_samples: int = 0
    train_s: float = 0.0
    interval_loss: float = 0.0
    interval_wait_s: float = 0.0
    interval_bytes: float = 0.0
    interval_steps: int = 0
    best_top1: float = -1.0
    best_step: int = 0
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)


class Staging:
    """Host memory for the files of one checkpoint, reused by all saves.

    The first use of new memory costs many times more than copying into it, and only pinned memory lets a GPU copy at
    the speed of the bus.

    Args:
        device: Device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        """Allocate at least so many bytes; discards the content if there are fewer."""
        if size > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # frees the old memory first
            pin = self._device.type == "cuda"
            self._memory = torch.empty(size + _HEADROOM, dtype=torch.uint8, pin_memory=pin).fill_(0)

    def put(self, progress: Progress, states: Mapping[str, Any]) -> dict[str, memoryview]:
        """Copy a state into the memory, in place of the previous one.

        Args:
            progress: Plain numbers.
            states: State dicts by name.

        Returns:
            Content by file name; valid until the next call.
        """
        files = {f"{name}{_SUFFIX}": _File(state) for name, state in states.items()}
        self.reserve(sum(file.space for file in files.values()))
        contents: dict[str, memoryview] = {"progress.json": memoryview(json.dumps(asdict(progress)).encode())}
        start = 0
        for name, file in files.items():
            memory = self._memory[start : start + file.size]
            file.copy_to(memory)
            contents[name] = memory.numpy().data
            start += file.space
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return contents


def staged_bytes(states: Mapping[str, Any]) -> int:
    """Return the bytes that state dicts need in the staging memory."""
    return sum(_File(state).space for state in states.values())


class _File:
    """The layout of a state dict in a file.

    Attributes:
        size: Bytes of the file.
        space: Bytes of the file, with padding up to the start of the next file.
    """

    def __init__(self, state: Any) -> None:
        tensors: dict[str, Tensor] = {}
        tree = _split(state, (), tensors)
        # The format allows no gaps: in this order all tensors are aligned.
        self._tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
        header: dict[str, Any] = {"__metadata__": {"tree": json.dumps(tree)}}
        end = 0
        for name, tensor in self._tensors.items():
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text = text.ljust(_round_up(8 + len(text)) - 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.size = len(self._header) + end
        self.space = _round_up(self.size)

    def copy_to(self, memory: Tensor) -> None:
        """Write the file into ``size`` bytes of host memory; copies from a GPU are asynchronous, in its stream."""
        end = len(self._header)
        memory[:end].copy_(torch.frombuffer(bytearray(self._header), dtype=torch.uint8))
        for tensor in self._tensors.values():
            begin, end = end, end + tensor.nbytes
            memory[begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


def from_files(read: checkpoint.Checkpoint) -> tuple[Progress, dict[str, Any]]:
    """Return the progress, and the state dicts by name, of a checkpoint; its tensors are on the host."""
    try:
        numbers = json.loads(read.files["progress.json"])
        if unknown := sorted(numbers.keys() - Progress.__dataclass_fields__.keys()):
            raise newer_version(f"the checkpoint of step {read.step}", unknown[0])
        progress = Progress(**numbers)
        states = {
            name.removesuffix(_SUFFIX): _load_state(content)
            for name, content in read.files.items()
            if name.endswith(_SUFFIX)
        }
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint of step {read.step} was not written by this version of the package: {error}"
        ) from error
    return progress, states


def _load_state(content: bytes) -> Any:
    tensors = safetensors.torch.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return _join(json.loads(header["__metadata__"]["tree"]), tensors)


def _split(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested state into ``tensors``; return the rest as JSON values with the tensors' names."""
    if isinstance(value, Tensor):
        name = ".".join(path)
        if name in tensors:
            raise ValueError(f"two tensors of a state have the name {name}")
        tensors[name] = value.detach()
        if value.is_contiguous():
            return {"tensor": name}
        # Files are contiguous, but sums over a tensor in another layout would differ in the last bit.
        return {"tensor": name, "strides": torch.empty_like(value, device="meta").stride()}
    if isinstance(value, dict):
        return {"dict": [[key, _split(item, (*path, str(key)), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_split(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a state has a {type(value).__name__}, which cannot be saved: {'.'.join(path)}")


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Reverse ``_split``."""
    if isinstance(tree, list):
        return [_join(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "dict" in tree:
        return {key: _join(item, tensors) for key, item in tree["dict"]}
    if "tuple" in tree:
        return tuple(_join(item, tensors) for item in tree["tuple"])
    tensor = tensors[tree["tensor"]]
    if "strides" in tree:
        tensor = torch.empty_strided(tensor.shape, tree["strides"], dtype=tensor.dtype).copy_(tensor)
    return tensor


def _round_up(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT
