"""Ranks of one node as threads of the test; their decoding processes are real ones."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.global_batch import GlobalBatch, Share
from rsb_cluster.data.order import groups_of
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.shared_index import SharedIndex
from rsb_cluster.storage.store import Store
from rsb_cluster.train.input.decoder_process import DecoderServer, ProcessBatches, Split
from rsb_cluster.train.input.neighbours import Neighbours, find_neighbours
from rsb_cluster.train.input.pixels.transforms import FastTrain, Transform
from rsb_cluster.train.input.sharing import Sharing
from rsb_cluster.train.input.streams import TrainStream
from tests.servers.daemons import GUARD_S, poll
from tests.unit.train.input.part import Part


def children(pid: int) -> list[int]:
    """The decoding processes, and the process that forks them, among the children of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return [child for child in found if _name(child) == "rsb-decoder"]


def _name(pid: int) -> str:
    """The name of a process that has not ended; one that init has not reaped yet has."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    return "" if "State:\tZ" in status else status.split("\n", 1)[0].removeprefix("Name:\t")


def decoders(pid: int) -> list[int]:
    return [decoder for server in children(pid) for decoder in children(server)]


def wait_until_gone(*pids: int) -> None:
    assert poll(lambda: not any(_name(pid) == "rsb-decoder" for pid in pids) or None, GUARD_S)


class Meeting:
    """Gathers texts of ranks that are threads."""

    def __init__(self, ranks: int) -> None:
        self._barrier, self._ranks = threading.Barrier(ranks), ranks
        self.said: dict[tuple[str, int], str] = {}

    def gather(self, rank: int) -> Callable[[str, str], list[str]]:
        def gathered(name: str, text: str) -> list[str]:
            self.said[name, rank] = text
            self._barrier.wait(30)
            return [self.said[name, other] for other in range(self._ranks)]

        return gathered


def shares_of(recipe: Recipe, virtual_ranks: int, world_size: int) -> list[Share]:
    """What each rank has of a global batch."""
    batch = GlobalBatch.of(recipe, virtual_ranks)
    assert batch.fits(world_size)
    return [batch.share(rank, world_size) for rank in range(world_size)]


def meet(
    recipe: Recipe, virtual_ranks: int, world_size: int, meeting: Meeting | None = None
) -> list[Neighbours | None]:
    """What each rank finds."""
    shares, meeting = shares_of(recipe, virtual_ranks, world_size), meeting or Meeting(world_size)
    groups = groups_of(virtual_ranks, recipe.augment.repeats)
    with ThreadPoolExecutor(world_size) as pool:
        found = [pool.submit(find_neighbours, meeting.gather(r), r, shares, groups) for r in range(world_size)]
        return [future.result() for future in found]


def close(near: Neighbours) -> None:
    """Close the sockets of neighbours that are not used."""
    for each in (near.listener, *near.sockets.values()):
        each.close()


def shared_batches(
    server: DecoderServer, data: Path, recipe: Recipe, virtual_ranks: int, rank: int, world_size: int,
    near: Neighbours | None, *, threads: int, start: int, stop: int, transform: Transform | None = None,
) -> ProcessBatches:  # fmt: skip
    """The batches of a rank that has these neighbours."""
    share = shares_of(recipe, virtual_ranks, world_size)[rank]
    part = Part(data, recipe, tuple(share.virtual_ranks), virtual_ranks)
    stream = TrainStream(
        ShardReader(Store(data / "train"), part.index), recipe, part.index, seed=0, virtual_ranks=virtual_ranks,
        local_virtual_ranks=share.virtual_ranks, start_step=start, stop_step=stop,
        sharing=near.sharing if near else Sharing.among([share], 0),
    )  # fmt: skip
    return ProcessBatches(
        server, Split(str(data / "train"), SharedIndex(part.index)), stream, transform or FastTrain(recipe),
        side=recipe.augment.resolution, threads=threads, pin=False, neighbours=near,
    )  # fmt: skip


def iterate_all(sources: list[Iterator]) -> list[list]:
    """Consume each rank's batches on a thread of its own; their copies."""

    def consume(source: Iterator) -> list:
        return [(b.images.clone(), b.labels, b.samples, b.good, b.bad) for b in source]

    with ThreadPoolExecutor(len(sources)) as pool:
        return list(pool.map(consume, sources))
