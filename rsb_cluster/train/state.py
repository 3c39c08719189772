"""The state of a training as files: plain numbers as JSON, each state dict as one file in the safetensors format.

In that format tensors lie in a file as they lie in memory, so a save is one copy into host memory: what was copied is
already the file. Nothing that is read is unpickled.
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
# Where a file begins, bytes: any type of number may lie there.
_ALIGNMENT = 64
# More is reserved than is needed, bytes: the numbers in a header get longer as training goes on.
_SPARE = 1 << 20


@dataclass
class Progress:
    """Where a training stands; the part of its state that is plain numbers.

    Attributes:
        step: Optimizer steps done.
        evaluated_step: Step of the last complete evaluation.
        bad_samples: Undecodable images of the present epoch so far.
        train_s: Seconds spent in the steps done, over all attempts.
        interval_loss: Sum of the losses since the last metric row, so that a resume leaves no trace in the rows.
        interval_wait_s: Seconds waited for data since the last metric row.
        interval_bytes: Bytes read from the store since the last metric row.
        interval_steps: Steps since the last metric row.
        best_top1: Best top-1 of an evaluation so far, percent; negative before the first.
        best_step: Its step.
        scores: Of the last complete evaluation, as plain values, by prefix: an attempt that finds nothing left to train
            writes the result from them. Empty in a checkpoint of a version that did not keep them.
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
    """Host memory that holds the files of one checkpoint, and is kept from one save to the next.

    The first use of fresh memory costs many times what copying into it costs, and a GPU copies into pinned memory only
    as fast as the bus allows.

    Args:
        device: Where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        """Have so many bytes ready; what was there before is lost if there were fewer."""
        if size > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # gives the old memory back first
            self._memory = torch.empty(size + _SPARE, dtype=torch.uint8, pin_memory=self._device.type == "cuda").fill_(
                0
            )

    def put(self, progress: Progress, states: Mapping[str, Any]) -> dict[str, memoryview]:
        """Copy a state here, in place of the one before.

        Args:
            progress: Plain numbers.
            states: State dicts by name.

        Returns:
            Content by file name; valid until the next call.
        """
        files = {f"{name}{_SUFFIX}": _File(state) for name, state in states.items()}
        self.reserve(sum(file.space for file in files.values()))
        placed: dict[str, memoryview] = {"progress.json": memoryview(json.dumps(asdict(progress)).encode())}
        start = 0
        for name, file in files.items():
            place = self._memory[start : start + file.size]
            file.copy_to(place)
            placed[name] = place.numpy().data
            start += file.space
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return placed


def space_of(states: Mapping[str, Any]) -> int:
    """Return how many bytes of a staging memory state dicts take."""
    return sum(_File(state).space for state in states.values())


class _File:
    """The layout of a state dict in a file.

    Attributes:
        size: Its bytes.
        space: Its bytes, and those up to where the next file may begin.
    """

    def __init__(self, state: Any) -> None:
        tensors: dict[str, Tensor] = {}
        tree = _split(state, (), tensors)
        # The format knows no gaps: in this order each number lies at a multiple of its own size.
        self._tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
        header: dict[str, Any] = {"__metadata__": {"tree": json.dumps(tree)}}
        end = 0
        for name, tensor in self._tensors.items():
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text = text.ljust(_rounded_up(8 + len(text)) - 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.size = len(self._header) + end
        self.space = _rounded_up(self.size)

    def copy_to(self, memory: Tensor) -> None:
        """Write the file into ``size`` bytes of host memory; what comes from a GPU may arrive later, in its stream."""
        end = len(self._header)
        memory[:end].copy_(torch.frombuffer(bytearray(self._header), dtype=torch.uint8))
        for tensor in self._tensors.values():
            begin, end = end, end + tensor.nbytes
            memory[begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


def from_files(read: checkpoint.Checkpoint, device: torch.device) -> tuple[Progress, dict[str, Any]]:
    """Return the plain numbers, and the state dicts by name, that a staging memory held."""
    try:
        numbers = json.loads(read.files["progress.json"])
        if unknown := sorted(numbers.keys() - Progress.__dataclass_fields__.keys()):
            raise newer_version(f"the checkpoint of step {read.step}", unknown[0])
        progress = Progress(**numbers)
        states = {
            name.removesuffix(_SUFFIX): _state_of(content, device)
            for name, content in read.files.items()
            if name.endswith(_SUFFIX)
        }
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint of step {read.step} was not written by this version of the package: {error}"
        ) from error
    return progress, states


def _state_of(content: bytes, device: torch.device) -> Any:
    tensors = safetensors.torch.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return _joined(json.loads(header["__metadata__"]["tree"]), tensors, device)


def _split(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """Take the tensors out of a nested state; return the rest, as JSON knows it, with their names in their places."""
    if isinstance(value, Tensor):
        name = ".".join(path)
        if name in tensors:
            raise ValueError(f"two tensors of a state have the name {name}")
        tensors[name] = value.detach()
        if value.is_contiguous():
            return {"tensor": name}
        # Files are contiguous. Sums over a tensor that comes back in another layout would differ in the last bit.
        return {"tensor": name, "strides": torch.empty_like(value, device="meta").stride()}
    if isinstance(value, dict):
        return {"dict": [[key, _split(item, (*path, str(key)), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_split(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a state holds a {type(value).__name__}, which cannot be saved: {'.'.join(path)}")


def _joined(tree: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Undo ``_split``."""
    if isinstance(tree, list):
        return [_joined(item, tensors, device) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "dict" in tree:
        return {key: _joined(item, tensors, device) for key, item in tree["dict"]}
    if "tuple" in tree:
        return tuple(_joined(item, tensors, device) for item in tree["tuple"])
    tensor = tensors[tree["tensor"]]
    if "strides" in tree:
        tensor = torch.empty_strided(tensor.shape, tree["strides"], dtype=tensor.dtype).copy_(tensor)
    return tensor.to(device)


def _rounded_up(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT
