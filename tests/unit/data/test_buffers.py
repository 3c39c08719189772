"""Memory that is used again."""

import random
import threading

import numpy as np

from rsb_cluster.data.buffers import BufferPool


def address(view: memoryview) -> int:
    return np.frombuffer(view, dtype=np.uint8).ctypes.data


def test_memory_comes_back_with_its_last_view() -> None:
    buffers = BufferPool()
    lent = buffers.acquire(1000)
    place, part = address(lent), lent.toreadonly()[10:20]
    del lent
    other = buffers.acquire(1000)
    assert address(other) != place  # somebody still looks at a part
    del part
    assert address(buffers.acquire(1000)) == place


def test_the_smallest_that_fits_is_lent() -> None:
    buffers = BufferPool()
    lent = [buffers.acquire(size) for size in (1000, 700, 1500)]
    places = [address(view) for view in lent]
    lent.clear()
    small = buffers.acquire(690)
    assert (len(small), address(small)) == (690, places[1])
    assert address(buffers.acquire(900)) == places[0]


def test_what_is_kept_is_bounded_when_sizes_change() -> None:
    buffers = BufferPool()
    for size in (10, 1000, 10, 100_000, 3, 500):
        lent = [buffers.acquire(size) for _ in range(4)]
        assert [len(view) for view in lent] == [size] * 4
        assert not buffers._free
        lent.clear()
        assert [buffer.size for buffer in buffers._free] == [size] * 4


def test_no_two_threads_have_the_same_memory() -> None:
    buffers, wrong = BufferPool(), []

    def work(number: int) -> None:
        rng, held = random.Random(number), list[tuple[memoryview, int]]()
        for turn in range(2000):
            view, mark = buffers.acquire(rng.randrange(1, 200)), rng.randrange(256)
            view[:] = bytes([mark]) * len(view)
            held.append((view[len(view) // 2 :], mark))
            if len(held) > 5:
                view, mark = held.pop(rng.randrange(len(held)))
                if bytes(view) != bytes([mark]) * len(view):
                    wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
