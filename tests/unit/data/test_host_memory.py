"""The memory of a node as it is said before the start is that of the streams and batches that its ranks will hold."""

from dataclasses import replace

import numpy as np
import pytest

from rsb_cluster.config.sweep_file import Grid, SweepFile
from rsb_cluster.data.global_batch import GlobalBatch
from rsb_cluster.data.host_memory import host_memory
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.plan import plan
from rsb_cluster.submission.request import Request
from rsb_cluster.train.input.sharing import Sharing
from rsb_cluster.train.input.streams import TrainStream
from tests.unit.bundled import load_job
from tests.unit.tars import index_of
from tests.unit.train.input.part import recipe_of

IMAGE = 3 * 224 * 224 + 16


@pytest.fixture(scope="module")
def index():
    bare = index_of([1000] * 4)
    return replace(bare, image_sizes=np.full(bare.num_samples, 110_000))


@pytest.mark.parametrize("virtual_ranks", [4, 8, 16])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_streams_and_batches_are_counted_as_they_are(index, virtual_ranks, repeats, ranks):
    recipe = recipe_of(
        f"augment.repeats={repeats}", "train.global_batch=64", f"data.train_samples={index.num_samples}",
        "augment.resolution=224", "eval.resolution=224", "data.shuffle_samples=500",
    )  # fmt: skip
    job = load_job("slurm", f"gpus_per_node={ranks}", "loader_workers=2")
    found = host_memory(recipe, job, index, virtual_ranks)
    batch = GlobalBatch.of(recipe, virtual_ranks)
    shares = [batch.share(rank, ranks) for rank in range(ranks)]
    streams = [
        TrainStream(
            ShardReader(Store("/nowhere"), index), recipe, index, seed=0, virtual_ranks=virtual_ranks,
            local_virtual_ranks=share.virtual_ranks, start_step=0, stop_step=1, sharing=Sharing.among([share], 0),
        )
        for share in shares
    ]  # fmt: skip
    order = streams[0].epoch_order(0)
    held = []  # blocks, of each rank
    for rank in range(ranks):
        sharing = Sharing.among(shares, rank)
        groups = set(map(order.group_of, sharing.virtual_ranks[rank]))
        blocks = [(order.members(group), order.block(group, 0)) for group in groups]
        held.append(sum(len(sharing.part(members, block, index)) / len(block) for members, block in blocks))
    together = max(stream.together for stream in streams)
    assert found.ranks == ranks
    assert found.blocks == pytest.approx(2 * max(held) * 500 * index.image_sizes.mean(), rel=0.02)
    assert found.batches == (together + 5) * streams[0].batch_size * IMAGE + 6 * 64 * IMAGE
    assert found.total == ranks * (10**9 + found.blocks + found.batches)
    assert str(found).startswith(f"{found.total / 1e9:.1f} GB per node = {ranks} ranks")


def test_fewer_nodes_and_no_threads_are_counted_as_such(index):
    recipe = recipe_of("train.global_batch=64", "augment.resolution=224", "eval.resolution=224")
    few, many = (
        host_memory(recipe, load_job("slurm", "gpus_per_node=2", "nodes=4", *more), index, 16)
        for more in (("min_nodes=1",), ())
    )
    assert few.blocks == 4 * many.blocks
    inline = host_memory(recipe, load_job("slurm", "gpus_per_node=2", "nodes=4", "loader_workers=0"), index, 16)
    assert inline.batches == 4 * IMAGE + 64 * IMAGE


def test_a_job_without_the_memory_is_refused_with_the_choices(tmp_path, digits):
    file = SweepFile(name="one", grid=(Grid(recipes=("digits",)),))
    request = Request(job="slurm-cpu", data=str(digits), runs=str(tmp_path), overrides=(("job.mem_gb", 0.5),))
    said = (
        r"needs more memory than the 0\.5 GB of a node \(job slurm-cpu\): at least 1\.\d GB per node = .*job\.mem_gb=N"
    )
    with pytest.raises(ConfigError, match=said):
        plan(file, None, request, is_sweep=False, dry_run=True)
