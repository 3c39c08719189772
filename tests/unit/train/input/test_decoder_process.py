"""Decoding in a process of its own: the same batches, whoever dies ends both sides and leaves nothing behind."""

import dataclasses
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsb_cluster.data.index import load_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.shared_index import SharedIndex
from rsb_cluster.data.subset import choose_classes
from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import Store
from rsb_cluster.train.causes import oom_kills
from rsb_cluster.train.input.decoder_process import DecoderDiedError, DecoderServer, ProcessBatches, Split
from rsb_cluster.train.input.loader import ThreadedBatches
from rsb_cluster.train.input.pixels.decode import BadImageError, EncodedImage, Pixels
from rsb_cluster.train.input.pixels.transforms import FastEval, FastTrain, Transform
from rsb_cluster.train.input.streams import EvalStream
from tests.command import ROOT
from tests.servers.daemons import GUARD_S, poll
from tests.unit.train.input.node import children, wait_until_gone
from tests.unit.train.input.part import Part, assert_same, recipe_of


@pytest.fixture
def server() -> Iterator[DecoderServer]:
    """One for each test: what it has forked is this test's, whatever of others is still ending."""
    made = DecoderServer.start()
    yield made
    made.close()


def batches(
    server: DecoderServer, part: Part, data: Path, *, threads: int = 2, start: int = 0, stop: int = 3,
    transform: Transform | None = None,
) -> ProcessBatches:  # fmt: skip
    split = Split(str(data / "train"), SharedIndex(part.index))
    return ProcessBatches(
        server, split, part.stream(start, stop), transform or FastTrain(part.recipe),
        side=part.recipe.augment.resolution, threads=threads, pin=False,
    )  # fmt: skip


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    virtual_ranks=st.sampled_from([1, 2, 4, 8]),
    world_size=st.sampled_from([1, 2, 4]),
    repeats=st.integers(1, 3),
    threads=st.integers(1, 4),
    start=st.integers(0, 40),
    steps=st.integers(1, 5),
)
def test_batches_are_those_of_the_rank_s_own_threads(
    server, digits, virtual_ranks, world_size, repeats, threads, start, steps
):
    world_size = min(world_size, virtual_ranks)
    recipe = recipe_of("augment.rand_augment=rand-m7-mstd0.5-inc1", f"augment.repeats={repeats}")
    per_process = virtual_ranks // world_size
    for rank in {0, world_size - 1}:
        mine = tuple(range(rank * per_process, (rank + 1) * per_process))
        part = Part(digits, recipe, mine, virtual_ranks)
        expected = list(part.batches(0, start, start + steps))
        made = batches(server, part, digits, threads=threads, start=start, stop=start + steps)
        count = 0
        for batch, other in zip(made, expected, strict=True):
            assert_same(batch, other)
            count += 1
        assert count == steps * per_process
        assert made.bytes_read == part.reader.bytes_read


def test_an_evaluation_goes_the_same_way(server, digits):
    recipe, store = recipe_of(), Store(digits / "val")
    index = load_index(store)
    for rank, world_size in ((0, 1), (2, 3)):
        stream = EvalStream(ShardReader(store, index), index, rank=rank, world_size=world_size, batch=48)
        side, transform = recipe.eval.resolution, FastEval(recipe.eval)
        split = Split(store.url, SharedIndex(index))
        made = ProcessBatches(server, split, stream, transform, side=side, threads=2, pin=False)
        expected = ThreadedBatches(stream, transform, side=side, threads=0, pin=False)
        for batch, other in zip(made, expected, strict=True):
            assert_same(batch, other)


def test_some_classes_are_chosen_there_as_well(server, digits):
    part = Part(digits, recipe_of())
    chosen = ("7", "3")
    part.index = choose_classes(part.index, chosen, "the digits")
    part.reader = ShardReader(Store(digits / "train"), part.index)
    part.recipe = recipe_of(f"data.train_samples={part.index.num_samples}")
    split = Split(str(digits / "train"), SharedIndex(part.index))
    side, transform = part.recipe.augment.resolution, FastTrain(part.recipe)
    made = ProcessBatches(server, split, part.stream(0, 3), transform, side=side, threads=2, pin=False)
    for batch, other in zip(made, part.batches(0, 0, 3), strict=True):
        assert_same(batch, other)


class Odd:
    """Some images are bad, with a word in the log."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, source: EncodedImage, seed: int, out: Pixels) -> None:
        if seed % 5 == 0:
            logging.getLogger("rsb_cluster.test").warning("seed %d is odd", seed)
            raise BadImageError("not today")
        self._transform(source, seed, out)


def test_bad_images_and_log_lines_reach_the_rank(server, digits, caplog):
    part = Part(digits, recipe_of())
    transform = Odd(FastTrain(part.recipe))
    side = part.recipe.augment.resolution
    expected = list(ThreadedBatches(part.stream(0, 3), transform, side=side, threads=0, pin=False))
    caplog.clear()
    for batch, other in zip(batches(server, part, digits, transform=transform), expected, strict=True):
        assert_same(batch, other)
    assert any(batch.bad for batch in expected)
    said = {record.message for record in caplog.records if "is odd" in record.message}
    assert len(said) == sum((~batch.good).sum() for batch in expected), "each image has a seed of its own"


class Broken:
    """Raises what a decoder must not."""

    def __init__(self, error: Exception, transform: Transform) -> None:
        self._error, self._transform = error, transform

    def __call__(self, source: EncodedImage, seed: int, out: Pixels) -> None:
        if seed % 17 == 0:
            raise self._error
        self._transform(source, seed, out)


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), DataError("a shard was replaced")])
def test_an_exception_is_raised_in_the_rank_with_the_image_and_the_traceback(server, digits, error):
    part = Part(digits, recipe_of())
    with pytest.raises(RuntimeError, match=r"decoding sample 'digits-\d+' failed") as caught:
        for _ in batches(server, part, digits, transform=Broken(error, FastTrain(part.recipe)), stop=20):
            pass
    assert "in __call__" in caught.value.__notes__[0]
    wait_until_gone(*children(server._pid))


def test_an_error_of_the_shards_keeps_its_kind(server, digits):
    part = Part(digits, recipe_of())
    other = dataclasses.replace(part.index, image_sizes=part.index.image_sizes + 1)
    split = Split(str(digits / "train"), SharedIndex(other))
    side, transform = part.recipe.augment.resolution, FastTrain(part.recipe)
    made = ProcessBatches(server, split, part.stream(), transform, side=side, threads=2, pin=False)
    with pytest.raises(DataError, match="was replaced or damaged after indexing"):
        next(iter(made))


def test_a_process_that_is_killed_is_an_error_and_others_are_forked(server, digits):
    part = Part(digits, recipe_of())
    source = iter(batches(server, part, digits, stop=22))
    next(source)
    (decoder,) = children(server._pid)
    os.kill(decoder, signal.SIGKILL)
    with pytest.raises(DecoderDiedError, match="it was killed, or a decoder crashed"):
        for _ in source:
            pass
    assert len(list(batches(server, part, digits, stop=1))) == 4


def test_a_batch_that_is_ready_is_taken_without_waiting(server, digits):
    part = Part(digits, recipe_of())
    made = batches(server, part, digits, stop=2)
    assert not made.ready(), "no iteration has begun"
    source = iter(made)
    next(source)
    (decoder,) = children(server._pid)
    for _ in range(7):
        assert poll(lambda: made.ready() or None, GUARD_S)
        os.kill(decoder, signal.SIGSTOP)  # what is ready does not need it
        next(source)
        os.kill(decoder, signal.SIGCONT)
    assert poll(lambda: made.ready() or None, GUARD_S), "the end is no wait, either"
    assert next(source, None) is None


def test_a_stream_that_is_left_early_ends_its_process(server, digits):
    part = Part(digits, recipe_of())
    source = iter(batches(server, part, digits, stop=22))
    for _ in range(3):
        next(source)
    found = children(server._pid)
    assert len(found) == 1
    source.close()
    wait_until_gone(*found)


def test_memory_is_used_again_and_never_while_it_is_needed(server, digits):
    """The consumer is slow, then fast; a stopped process only makes it wait."""
    part = Part(digits, recipe_of())
    expected = part.batches(0, 0, 10)
    source = iter(batches(server, part, digits, stop=10))
    first = next(source)
    (decoder,) = children(server._pid)
    assert not poll(lambda: None, 0.3)  # it decodes as many as there is room for, and waits
    os.kill(decoder, signal.SIGSTOP)
    for batch, other in zip(itertools.chain([first], itertools.islice(source, 4)), expected, strict=False):
        assert_same(batch, other)
    os.kill(decoder, signal.SIGCONT)
    for batch, other in zip(source, itertools.islice(part.batches(0, 0, 10), 5, None), strict=True):
        assert_same(batch, other)


def test_a_process_that_gets_no_memory_is_killed_and_the_rank_says_so(digits, no_memory):
    part, own = Part(digits, recipe_of()), DecoderServer.start()
    kills = oom_kills()
    (no_memory / "cgroup.procs").write_text(str(own._pid))  # so that what it forks begins there
    with pytest.raises(DecoderDiedError):
        for _ in batches(own, part, digits, stop=22):
            pass
    own.close()
    assert oom_kills() > kills, "by which the attempt's end names the reason"


RANK = """
import json, os, signal, sys
from pathlib import Path
from rsb_cluster.train.input.decoder_process import DecoderServer
from tests.unit.train.input.part import Part, recipe_of
from tests.unit.train.input.node import children, decoders
from tests.unit.train.input.test_decoder_process import batches
data = Path(sys.argv[1])
server = DecoderServer.start()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, lambda *_: None)
part = Part(data, recipe_of())
training, evaluation = iter(batches(server, part, data, stop=22)), iter(batches(server, part, data, stop=22))
next(training), next(evaluation)
print(json.dumps([*children(os.getpid()), *decoders(os.getpid())]), flush=True)
for line in sys.stdin:
    print(sum(int(batch.samples.sum()) for _, batch in zip(range(8), training)), flush=True)
"""


def test_a_job_step_is_signalled_as_a_whole_and_a_killed_rank_leaves_nothing(digits):
    command = [sys.executable, "-c", RANK, str(digits)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as rank:
        assert rank.stdin is not None and rank.stdout is not None
        found = json.loads(rank.stdout.readline())
        assert len(found) == 3, "one that forks, and one for each of two streams"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.killpg(rank.pid, number)
        rank.stdin.write("\n")
        rank.stdin.flush()
        part = Part(digits, recipe_of())
        numbers = [int(batch.samples.sum()) for batch in part.batches(0, 0, 3)]
        assert int(rank.stdout.readline()) == sum(numbers[1:9])
        rank.kill()
    wait_until_gone(*found)
