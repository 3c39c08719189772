"""The predictions of a network for every image of a part, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rsb_cluster.data.scoring import TOP_K, UNDECODABLE, Classes
from rsb_cluster.errors import DataError
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.input.loader import Batch
from rsb_cluster.train.validation.validate import to_device


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of a network for all N images of an index, in the index's order.

    Attributes:
        best: The classes with the largest logits, best first, shape (N, 5); -1 where there are fewer classes, and for
            an image that could not be decoded.
        loss: Mean cross-entropy with the index's labels over the images that could be decoded, nats.
        bad: Images that could not be decoded.
    """

    best: Classes
    loss: float
    bad: int


def gather_predictions(
    outputs: Iterable[tuple[Batch, Tensor]],
    *,
    total: int,
    allowed: Classes | None,
    group: ProcessGroup,
    progress: Callable[[int], None],
) -> Predictions:
    """Gather the predictions of all processes.

    Args:
        outputs: Batches of this process, and the logits of each.
        total: Images in the index, N.
        allowed: The classes that can be predicted; None for all.
        group: The processes.
        progress: Called with the number of images of this process so far.

    Raises:
        DataError: An image is missing or duplicate.
    """
    device = group.device
    classes = None if allowed is None else torch.from_numpy(allowed).to(device)
    table = torch.zeros((total, TOP_K + 1), dtype=torch.int64, device=device)  # last column: occurrences of the image
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # losses, undecodable images
    done = 0
    for batch, logits_BK in outputs:
        labels_B, good_B, samples_B = (to_device(x, device) for x in (batch.labels, batch.good, batch.samples))
        losses_B = F.cross_entropy(logits_BK, labels_B, reduction="none") * good_B
        sums += torch.stack([losses_B.double().sum(), (~good_B).double().sum()])
        allowed_BK = logits_BK if classes is None else logits_BK[:, classes]
        best_B5 = allowed_BK.topk(min(TOP_K, allowed_BK.shape[1]), dim=1).indices
        best_B5 = best_B5 if classes is None else classes[best_B5]
        padded_B5 = F.pad(best_B5, (0, TOP_K - best_B5.shape[1]), value=UNDECODABLE)
        table[samples_B, :TOP_K] = torch.where(good_B[:, None], padded_B5, UNDECODABLE)
        table[samples_B, TOP_K] += 1
        done += len(samples_B)
        progress(done)
    summed = group.sum_(table).cpu().numpy()
    loss, bad = group.sum_(sums).tolist()
    wrong = np.flatnonzero(summed[:, TOP_K] != 1)
    if wrong.size:
        raise DataError(
            f"{wrong.size} images of the index were not evaluated exactly once, such as number {wrong[0]}. This is a "
            "bug in the distribution of samples; report it."
        )
    return Predictions(summed[:, :TOP_K], loss / max(1, total - int(bad)), int(bad))
