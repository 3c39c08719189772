"""Do making, indexing, verifying and planning scale to ImageNet? Time and peak memory, with tiny images.

    python -m tests.benchmarks.scale [--samples 1281167] [--workers 2] [--folder DIR] [--only STAGE]...

It writes an ILSVRC2012_img_train.tar of 1,000 classes whose images are a few hundred bytes, and takes it through
`shards make`, `index`, `verify` and the order of an epoch. With so small images the work per *sample* is all there is;
the work per byte (reading, hashing) comes on top and is bound by disks. Each stage is a process of its own, so its peak
memory is its own. The peer is webdataset's ShardWriter in one process, on a tenth of the same samples.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

CLASSES = 1000
IMAGENET = 1_281_167


def write_tar(root: Path, samples: int) -> None:
    """Write the tar of tars; each image is decodable and has bytes of its own."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "orange").save(buffer, "JPEG")
    image = buffer.getvalue()
    number = 0
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for label in range(CLASSES):
            wnid, buffer = f"n{label:08d}", io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as inner:
                for i in range((samples * (label + 1)) // CLASSES - (samples * label) // CLASSES):
                    content = image + number.to_bytes(8, "big")  # what follows a JPEG's end is passed over
                    number += 1
                    member = tarfile.TarInfo(f"{wnid}_{i}.JPEG")
                    member.size = len(content)
                    inner.addfile(member, io.BytesIO(content))
                    inner.members.clear()
            member = tarfile.TarInfo(f"{wnid}.tar")
            member.size = len(buffer.getvalue())
            outer.addfile(member, io.BytesIO(buffer.getvalue()))
    assert number == samples


def stage(name: str, root: Path, workers: int) -> dict[str, float]:
    """Run one stage in this process; return seconds, samples and peak memory."""
    from rsb_cluster.data.index import load_index
    from rsb_cluster.data.indexing import build_index
    from rsb_cluster.data.make import make_set
    from rsb_cluster.data.order import EpochOrder
    from rsb_cluster.data.sources import open_set
    from rsb_cluster.data.verify import verify
    from rsb_cluster.storage.store import Store

    workers_mib = watch_workers()
    set_, part = Store(root / "shards"), Store(root / "shards" / "train")
    start, start_cpu = time.perf_counter(), cpu_s()
    if name in ("list the tar", "webdataset"):
        source = open_set("imagenet-1k", root=root, split="train", any_count=True)["train"]
        samples = len(source)
        if name == "webdataset":
            import webdataset

            samples //= 10
            start, start_cpu = time.perf_counter(), cpu_s()
            with webdataset.ShardWriter(str(root / "peer-%06d.tar"), maxcount=1000, verbose=0) as writer:
                for i in source.order()[:samples]:
                    key, image, extension, label = source.sample(int(i))
                    writer.write({"__key__": key, extension: image, "cls": label})
    elif name == "make":
        sources = open_set("imagenet-1k", root=root, split="train", any_count=True)
        samples = make_set(sources, set_, workers=workers)["train"].num_samples
    elif name == "make again":
        (root / "shards" / "train" / "index.npz").unlink()  # as if killed before its last file
        sources = open_set("imagenet-1k", root=root, split="train", any_count=True)
        samples = make_set(sources, set_, workers=workers)["train"].num_samples
    elif name == "index":
        samples = build_index(part, workers=workers).num_samples
    elif name == "load the index":
        samples = load_index(part).num_samples
    elif name == "verify":
        report = verify(part, workers=workers)
        assert report.problems == [], report.problems[:3]
        samples = report.samples
    else:  # an epoch of A2: 2,048 images a step on 32 virtual ranks, three copies of each
        index = load_index(part)
        start, start_cpu = time.perf_counter(), cpu_s()
        order = EpochOrder(index, seed=0, epoch=0, global_batch=2048, virtual_ranks=32, repeats=3, block=4096, piece=64)
        samples = order.steps * 2048
        if name == "plan an epoch, and draw all of one rank":
            for step in range(order.steps):
                order.draw(step, 0)
    seconds = time.perf_counter() - start
    own_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": seconds,
        "cpu_s": cpu_s() - start_cpu,
        "samples": samples,
        "self_mib": own_mib,
        "worker_mib": max(workers_mib, default=0.0),
    }


def cpu_s() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def watch_workers() -> list[float]:
    """Return a list to which the peak memory (MiB) of this process's children is added, ten times a second.

    getrusage() does not tell it: a child that was forked by a large process counts that one's memory as its own.
    """
    found: list[float] = []

    def watch() -> None:
        while True:
            time.sleep(0.1)
            pids = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
            for pid in pids:
                with contextlib.suppress(OSError):
                    lines = Path("/proc", pid, "status").read_text().splitlines()
                    found.extend(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

    threading.Thread(target=watch, daemon=True).start()
    return found


STAGES = (
    "webdataset", "list the tar", "make", "make again", "index", "load the index", "verify",
    "plan an epoch", "plan an epoch, and draw all of one rank",
)  # fmt: skip


def main() -> None:
    """Run all stages and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=IMAGENET)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="needs 7 GB; a temporary one by default, and kept if given")
    parser.add_argument("--only", choices=STAGES, action="append", help="needs a --folder in which all was run before")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(stage(options.stage, options.folder, options.workers)))
        return
    root = options.folder or Path(tempfile.mkdtemp(prefix="rsb-scale-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        if not (root / "ILSVRC2012_img_train.tar").exists():
            write_tar(root, options.samples)
        print(f"{options.samples:,} samples, {options.workers} workers\n")
        print("| stage | time | CPU time | samples per CPU second | peak memory | of a worker |")
        print("|---|---|---|---|---|---|", flush=True)
        for name in options.only or STAGES:
            command = [sys.executable, "-m", "tests.benchmarks.scale", "--stage", name, "--folder", str(root)]
            done = subprocess.run([*command, "--workers", str(options.workers)], check=True, stdout=subprocess.PIPE)
            found = json.loads(done.stdout.splitlines()[-1])
            cells = (
                name,
                f"{found['seconds']:.1f} s",
                f"{found['cpu_s']:.1f} s",
                f"{found['samples'] / found['cpu_s']:,.0f}",
                f"{found['self_mib']:,.0f} MiB",
                f"{found['worker_mib']:,.0f} MiB" if found["worker_mib"] else "",
            )
            print(f"| {' | '.join(cells)} |", flush=True)
    finally:
        if options.folder is None:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
