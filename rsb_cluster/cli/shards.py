"""Commands that make, index, check and describe shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli.terminal import console, new_table, progress_bar
from rsb_cluster.errors import RsbError

if TYPE_CHECKING:
    from rsb_cluster.data.index import ShardIndex


@click.group()
def shards() -> None:
    """WebDataset shards: make, index, verify, stats."""


@shards.command("make")
@click.argument("source")
@click.argument("dest")
@click.option("--root", type=click.Path(path_type=Path), help="Where a torchvision data set lies.")
@click.option("--split", type=click.Choice(["train", "val"]), help="Make this part only.")
@click.option("--shard-samples", default=1000, show_default=True, help="Samples in a shard.")
@click.option("--overwrite", is_flag=True, help="Replace shards that are there.")
def shards_make(
    source: str, dest: str, root: Path | None, split: str | None, shard_samples: int, overwrite: bool
) -> None:
    r"""Make shards and their index from SOURCE in the folder or s3:// URL DEST.

    SOURCE is an image folder (a folder per class, in train/ and val/), the name of a torchvision data set that is on
    disk, or 'digits'. DEST will hold train/ and val/. Samples are shuffled.

    \b
    rsb-cluster shards make ./my-images s3://bucket/my-images
    rsb-cluster shards make FashionMNIST data/fashion-mnist --root /usr/share/datasets/fashion-mnist
    """
    from rsb_cluster.data.make import make_set
    from rsb_cluster.data.sources import open_set
    from rsb_cluster.storage import Store

    with progress_bar("making shards") as progress:
        made = make_set(
            open_set(source, root=root, split=split),
            Store(dest),
            shard_samples=shard_samples,
            overwrite=overwrite,
            progress=progress,
        )
    for name, index in made.items():
        click.echo(f"{name}: {_samples_in(index)}")


@shards.command("index")
@click.argument("folder")
@click.option("--workers", default=0, help="Processes that read shards; 0: one per core.")
def shards_index(folder: str, workers: int) -> None:
    """Index the .tar files of FOLDER (a part: …/train or …/val), whoever wrote them."""
    from rsb_cluster.data.index import build_index
    from rsb_cluster.storage import Store

    with progress_bar("indexing") as progress:
        index = build_index(Store(folder), workers=workers, progress=progress)
    click.echo(_samples_in(index))


@shards.command("verify")
@click.argument("folder")
@click.option("--decode", is_flag=True, help="Decode every image, too.")
def shards_verify(folder: str, decode: bool) -> None:
    """Compare the shards of FOLDER with their index: sizes, checksums, keys."""
    from rsb_cluster.data.verify import verify
    from rsb_cluster.storage import Store

    problems = 0
    for part in _parts(folder):
        with progress_bar(f"verifying {part}") as progress:
            report = verify(Store(part), decode=decode, progress=progress)
        for problem in report.problems:
            click.echo(problem)
        click.echo(f"{part}: {report.samples:,} samples in {report.shards} shards, {len(report.problems)} problems")
        problems += len(report.problems)
    if problems:
        raise RsbError("the shards are not as they were when they were indexed. Copy them again, or index them anew.")


@shards.command("stats")
@click.argument("folder")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def shards_stats(folder: str, as_json: bool) -> None:
    """Say what FOLDER holds, from its index alone."""
    from rsb_cluster.data.verify import stats
    from rsb_cluster.storage import Store

    found = {part: vars(stats(Store(part))) for part in _parts(folder)}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table = new_table("", *found)
    for key in next(iter(found.values())):
        table.add_row(key.replace("_", " "), *(f"{values[key]:,.10g}" for values in found.values()))
    console().print(table)


def _samples_in(index: ShardIndex) -> str:
    return f"{index.num_samples:,} samples of {index.num_classes} classes in {len(index.shards)} shards"


def _parts(folder: str) -> list[str]:
    from rsb_cluster.data.index import INDEX_NAME
    from rsb_cluster.storage import Store

    store = Store(folder)
    parts = [f"{folder.rstrip('/')}/{name}" for name in ("train", "val") if store.exists(f"{name}/{INDEX_NAME}")]
    return parts or [folder]
