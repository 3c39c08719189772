"""The loaders that the benchmark compares: each an endless iterator of uint8 batches from the same shards.

All crop, flip and augment as A2 does (random resized crop, bicubic; rand-m7-mstd0.5-inc1), or evaluate as it does
(crop 0.95 of the short side, bicubic), and leave normalisation to the device. Only torchvision's RandAugment is another
policy: its own operations, at the same magnitude. Where a peer can be tuned, it is as its authors advise: as many
worker processes as cores, and no conversion to floats in them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm.data
import torch
import torchvision
import webdataset
from torchvision.transforms import v2

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.data.index import load_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.shared_index import SharedIndex
from rsb_cluster.storage.s3_settings import endpoint_url
from rsb_cluster.storage.store import Store
from rsb_cluster.train.input.decoder_process import DecoderServer, ProcessBatches, Split
from rsb_cluster.train.input.pixels.transforms import FastEval, FastTrain
from rsb_cluster.train.input.streams import EvalStream, TrainStream

BATCH = 128
AUGMENT = "rand-m7-mstd0.5-inc1"


@dataclass(frozen=True)
class Task:
    """What is to be loaded, and on what."""

    url: str  # of the folder with the shards
    side: int
    training: bool
    workers: int

    @property
    def shards(self) -> list[str]:
        store = Store(self.url)
        return [store.locate(name) for name in store.files() if name.endswith(".tar")]


def _transform(task: Task) -> Any:
    options: dict[str, Any] = {"auto_augment": AUGMENT, "color_jitter": 0} if task.training else {"crop_pct": 0.95}
    return timm.data.create_transform(
        (3, task.side, task.side), is_training=task.training, use_prefetcher=True, interpolation="bicubic", **options
    )


def _endless(loader: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(loader for _ in itertools.count())


def timm_loader(task: Task) -> Iterator[Any]:
    """timm's create_loader on its webdataset reader; the prefetcher's GPU part left out."""
    names = f"shard-{{000000..{len(task.shards) - 1:06d}}}.tar"
    dataset = timm.data.create_dataset(
        f"wds/{task.url}", root=task.url, split=f"{names}|{load_index(Store(task.url)).num_samples}",
        is_training=task.training, batch_size=BATCH,
    )  # fmt: skip
    loader = timm.data.create_loader(
        dataset, (3, task.side, task.side), BATCH, is_training=task.training, use_prefetcher=False,
        num_workers=task.workers, persistent_workers=True,
    )  # fmt: skip
    loader.dataset.transform = _transform(task)  # as with the prefetcher: uint8
    return _endless(loader)


def _webloader(task: Task, shards: list[str], transform: Callable[[Any], Any], decoder: str | None) -> Iterator[Any]:
    shuffled: dict[str, Any] = {"shardshuffle": len(shards), "resampled": True} if task.training else {}
    dataset = webdataset.WebDataset(
        shards, nodesplitter=webdataset.split_by_node, **({"shardshuffle": False} | shuffled)
    )
    if task.training:
        dataset = dataset.shuffle(1000)
    if decoder:
        dataset = dataset.decode(decoder)
    dataset = dataset.to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH)
    return _endless(webdataset.WebLoader(dataset, batch_size=None, num_workers=task.workers, persistent_workers=True))


def webdataset_loader(task: Task) -> Iterator[Any]:
    """webdataset's WebLoader with timm's transforms."""
    return _webloader(task, task.shards, _transform(task), "pil")


def webdataset_s3fs(task: Task) -> Iterator[Any]:
    """The same; each worker opens its shards by s3fs."""

    def opened(url: str, mode: str, bufsize: int, **_: Any) -> Any:
        import s3fs

        return s3fs.S3FileSystem(endpoint_url=endpoint_url()).open(url, mode)

    webdataset.gopen_schemes["s3"] = opened
    return webdataset_loader(task)


def webdataset_curl(task: Task) -> Iterator[Any]:
    """The same; curl fetches the shards from presigned URLs."""
    import botocore.session

    client = botocore.session.Session().create_client("s3", endpoint_url=endpoint_url())
    shards = []
    for url in task.shards:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        signed = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=7200)
        shards.append(f"pipe:curl -s -f '{signed}'")
    return _webloader(task, shards, _transform(task), "pil")


def _torchvision(transform: Any, jpeg: bytes) -> torch.Tensor:
    encoded = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
    result: torch.Tensor = transform(torchvision.io.decode_image(encoded, torchvision.io.ImageReadMode.RGB))
    return result


def torchvision_v2(task: Task) -> Iterator[Any]:
    """torchvision's decoder and its v2 transforms on uint8 tensors, on webdataset's reader."""
    cubic = v2.InterpolationMode.BICUBIC
    if task.training:
        steps = [
            v2.RandomResizedCrop(task.side, interpolation=cubic, antialias=True), v2.RandomHorizontalFlip(),
            v2.RandAugment(2, 7),
        ]  # fmt: skip
    else:
        steps = [v2.Resize(int(task.side / 0.95), interpolation=cubic, antialias=True), v2.CenterCrop(task.side)]
    return _webloader(task, task.shards, partial(_torchvision, v2.Compose(steps)), None)


def ours(task: Task, repeats: int = 1) -> Iterator[Any]:
    """This package's loader, with its decoding process."""
    server = DecoderServer.start()
    store = Store(task.url)
    split = Split(task.url, SharedIndex(load_index(store)))
    index = split.index.index
    virtual_ranks = repeats
    recipe = load_recipe(
        "a2",
        overrides=parse_overrides([
            f"augment.resolution={task.side}", f"eval.resolution={task.side}", f"augment.repeats={repeats}",
            f"train.global_batch={BATCH * virtual_ranks}", f"data.train_samples={index.num_samples}",
        ]),
    ).recipe  # fmt: skip
    reader = ShardReader(store, index)
    if not task.training:
        stream = EvalStream(reader, index, rank=0, world_size=1, batch=BATCH)
        transform = FastEval(recipe.eval)
        return _endless(
            ProcessBatches(server, split, stream, transform, side=task.side, threads=task.workers, pin=False)
        )
    training = TrainStream(
        reader, recipe, index, seed=0, virtual_ranks=virtual_ranks, local_virtual_ranks=range(virtual_ranks),
        start_step=0, stop_step=recipe.total_steps,
    )  # fmt: skip
    return iter(
        ProcessBatches(server, split, training, FastTrain(recipe), side=task.side, threads=task.workers, pin=False)
    )


OURS = "rsb-cluster"
LOCAL: dict[str, Callable[[Task], Iterator[Any]]] = {
    "timm create_loader": timm_loader,
    "timm on pillow-simd": timm_loader,  # in another environment
    "webdataset WebLoader, timm": webdataset_loader,
    "torchvision v2": torchvision_v2,
    OURS: ours,
    f"{OURS}, 3 repeats": partial(ours, repeats=3),
}
S3: dict[str, Callable[[Task], Iterator[Any]]] = {
    "webdataset + s3fs": webdataset_s3fs,
    "webdataset + curl": webdataset_curl,
    OURS: ours,
    f"{OURS}, 3 repeats": partial(ours, repeats=3),
}


def contend(name: str, task: Task, cores: int) -> Iterator[Any]:
    """Start a contender on so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(1)
    return (S3 if task.url.startswith("s3://") else LOCAL)[name](task)
