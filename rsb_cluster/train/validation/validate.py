"""Exact evaluation: every image counts once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsb_cluster.errors import DataError
from rsb_cluster.runs.run import Cause
from rsb_cluster.train.augment import Normalise
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.input.loader import Batch
from rsb_cluster.train.input.streams import EvalStream


@dataclass(frozen=True)
class Score:
    """Result of an evaluation.

    Attributes:
        top1: Share of images whose class is predicted, percent.
        top5: Share of images whose class is among the five (or K, if fewer) largest logits, percent.
        loss: Mean cross-entropy, nats.
        samples: Images counted.
        bad: Images that could not be decoded; they are counted as wrong, and not in the loss.
    """

    top1: float
    top5: float
    loss: float
    samples: int
    bad: int


class EvaluationStopped(Exception):
    """The ranks agreed to stop in the middle of an evaluation."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause = cause


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    batches: Iterable[Batch],
    stream: EvalStream,
    *,
    device: torch.device,
    normalise: Normalise,
    autocast: Callable[[], Any],
    agree: Callable[[], Cause | None],
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch of this process, and the model's logits for it: float32, shape (B, K).

    Args:
        model: The network; left in evaluation mode.
        batches: The stream's decoded batches.
        stream: This process's part of the evaluation set.
        device: Device of the model.
        normalise: From uint8 to the model's input.
        autocast: Returns the context of the forward pass.
        agree: Called by every rank after each round; a cause ends the evaluation.

    Raises:
        EvaluationStopped: The ranks agreed on a cause.
    """
    model.eval()
    source = iter(batches)
    for _ in range(stream.rounds):
        batch = next(source, None)
        if batch is not None:
            images_BCHW = normalise(batch.to(device)[0])
            with autocast():
                logits_BK = model(images_BCHW)
            yield batch, logits_BK.float()
        cause = agree()
        if cause is not None:
            raise EvaluationStopped(cause)


def compute_score(outputs: Iterable[tuple[Batch, Tensor]], *, total: int, group: ProcessGroup) -> Score:
    """Return the score over all processes.

    Args:
        outputs: Batches of this process, and the logits of each.
        total: Images in the index; the sum over all processes is checked against it.
        group: The processes.

    Raises:
        DataError: The number of images differs from that of the index.
    """
    # top-1 hits, top-5 hits, sum of losses, images, images that could not be decoded
    sums = torch.zeros(5, dtype=torch.float64, device=group.device)
    for batch, logits_BK in outputs:
        sums += _counts(batch, logits_BK)
    hits1, hits5, loss, counted, bad = group.sum_(sums).tolist()
    if int(counted) != total:
        raise DataError(
            f"the evaluation counted {int(counted)} images, the index has {total}. Shards changed while they were "
            "read (run 'rsb-cluster shards verify'), or this is a bug in the distribution of samples; report it."
        )
    return Score(100 * hits1 / total, 100 * hits5 / total, loss / max(1, total - bad), total, int(bad))


def _counts(batch: Batch, logits_BK: Tensor) -> Tensor:
    device = logits_BK.device
    labels_B, good_B = to_device(batch.labels, device), to_device(batch.good, device)
    top_B5 = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
    hit_B5 = (top_B5 == labels_B[:, None]) & good_B[:, None]
    losses_B = F.cross_entropy(logits_BK, labels_B, reduction="none") * good_B
    counts = [hit_B5[:, 0].sum(), hit_B5.sum(), losses_B.double().sum(), torch.ones_like(good_B).sum(), (~good_B).sum()]
    return torch.stack([count.double() for count in counts])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor of the host on a device; the host does not wait for what the device does before."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
