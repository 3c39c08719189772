"""The commands that make, index, verify and describe shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli.terminal import console, log, new_table, progress_bar
from rsb_cluster.errors import RsbError

if TYPE_CHECKING:
    from rsb_cluster.data.index import ShardIndex
    from rsb_cluster.data.split_folder import Removal


workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="Number of processes.  [default: one per core, fewer for small sets]"
)


@click.group()
def shards() -> None:
    """Make, index, verify and describe WebDataset shards."""


@shards.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def shards_list(as_json: bool) -> None:
    """List the data sets that 'shards make' knows by name."""
    from rsb_cluster.data.datasets import known_data_sets

    known = known_data_sets()
    if as_json:
        click.echo(json.dumps([data_set.model_dump(mode="json") for data_set in known.values()], indent=2))
        return
    table = new_table("name", "train", "val", "classes", "metric", "licence", "download")
    for name, found in known.items():
        counts = [f"{found.samples[part]:,}" if part in found.samples else "" for part in ("train", "val")]
        metrics = ", ".join((found.metric, *found.also)).replace("_", " ")
        table.add_row(name, *counts, f"{found.classes:,}", metrics, found.licence, found.download)
    console().print(table)


@shards.command("make")
@click.argument("source")
@click.argument("dest")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the files of a data set known by name.")
@click.option("--split", type=click.Choice(["train", "val"]), help="Make only this part.")
@click.option("--shard-samples", default=1000, show_default=True, help="Samples per shard, at most.")
@click.option(
    "--max-side",
    type=int,
    metavar="PIXELS",
    help="Downscale larger images to this longer side, as JPEG.",
)
@click.option("--quality", type=int, help="JPEG quality of downscaled images.  [default: 95]")
@click.option("--any-count", is_flag=True, help="Accept a known data set with an unexpected number of images.")
@click.option(
    "--hash", "by_bytes", is_flag=True, help="Compare existing shards with the source by content, not only by size."
)
@click.option("--remake", is_flag=True, help="Replace shards in DEST that 'shards make' wrote.")
@click.option("--overwrite", is_flag=True, help="Replace all .tar files in DEST/train and DEST/val.")
@click.option("--yes", is_flag=True, help="With --overwrite: do not ask before files of others are deleted.")
@workers_option
def shards_make(
    source: str,
    dest: str,
    root: Path | None,
    split: str | None,
    shard_samples: int,
    max_side: int | None,
    quality: int | None,
    any_count: bool,
    by_bytes: bool,
    remake: bool,
    overwrite: bool,
    yes: bool,
    workers: int | None,
) -> None:
    """Make shards and their index.

    SOURCE is the name of a data set ('shards list'), a folder of images (train/ and val/ with a folder per class), a
    folder of parquet files, or the name of a torchvision data set that is on disk. DEST is a folder or s3:// URL, and
    will hold train/ and val/. Samples are shuffled, and image files are stored unchanged.

    If the command was killed, run it again to resume. If images were added or removed or have another size since, it
    refuses and asks for --remake.

    Files that this command did not write are deleted only with --overwrite: it lists them and asks for confirmation
    (or takes --yes).

    \b
    rsb-cluster shards make imagenet-1k s3://bucket/imagenet-1k --root /data/ilsvrc
    rsb-cluster shards make ./my-images data/my-images --max-side 512
    rsb-cluster shards make ./hub/beans data/beans
    """
    from rsb_cluster.data.make import plan_set
    from rsb_cluster.data.recode import QUALITY, Recode
    from rsb_cluster.data.sources import open_set
    from rsb_cluster.storage.store import Store

    if quality is not None and max_side is None:
        raise click.UsageError("--quality needs --max-side: without it, images are stored unchanged.")
    if yes and not overwrite:
        raise click.UsageError("--yes needs --overwrite.")
    if remake + overwrite + by_bytes > 1:
        raise click.UsageError("--hash, --remake and --overwrite exclude one another: use one of them.")
    data_set = open_set(source, root=root, split=split, any_count=any_count)
    with progress_bar("reading existing shards") as progress:
        plan = plan_set(
            data_set,
            Store(dest),
            shard_samples=shard_samples,
            recode=Recode(max_side, QUALITY if quality is None else quality) if max_side is not None else None,
            remake=remake,
            overwrite=overwrite,
            by_bytes=by_bytes,
            workers=workers,
            progress=progress,
        )
    _confirm_removals(plan.removals, yes)
    with progress_bar("making shards") as progress:
        made = plan.make(workers, progress)
    for name, index in made.items():
        click.echo(f"{name}: {_samples_in(index)}")


@shards.command("index")
@click.argument("folder")
@workers_option
def shards_index(folder: str, workers: int | None) -> None:
    """Index existing .tar files. FOLDER is one part of a data set (…/train or …/val)."""
    from rsb_cluster.data.index import build_index
    from rsb_cluster.storage.store import Store

    with progress_bar("indexing") as progress:
        index = build_index(Store(folder), workers=workers, progress=progress)
    click.echo(_samples_in(index))


@shards.command("labels")
@click.argument("name", type=click.Choice(["real"]))
@click.argument("folder")
@click.option("--from", "file", type=click.Path(path_type=Path), help="The authors' real.json.  [default: timm's copy]")
def shards_labels(name: str, folder: str, file: Path | None) -> None:
    """Add ReaL labels to existing shards. FOLDER holds the ImageNet validation set.

    'shards make imagenet-1k' adds them itself. Images are matched by the number in the key (ILSVRC2012_val_00000001).
    """
    from rsb_cluster.data.index import load_index
    from rsb_cluster.data.labels import real_labels, renew_labels
    from rsb_cluster.storage.store import Store

    store = Store(folder)
    index = load_index(store)
    found = real_labels((index.key(i) for i in range(index.num_samples)), file)
    renew_labels(store, name, found)
    click.echo(f"{sum(map(bool, found.labels.values())):,} of {index.num_samples:,} images have labels '{name}'")


@shards.command("verify")
@click.argument("folder")
@click.option("--decode", is_flag=True, help="Also decode every image.")
@workers_option
def shards_verify(folder: str, decode: bool, workers: int | None) -> None:
    """Verify shards. Sizes, checksums and keys are compared with the index, and duplicate images are counted."""
    from rsb_cluster.data.verify import shared_images, verify
    from rsb_cluster.storage.store import Store

    reports = {}
    for part in _parts(folder):
        with progress_bar(f"verifying {part}") as progress:
            report = verify(Store(part), decode=decode, workers=workers, progress=progress)
        for problem in report.problems:
            click.echo(problem)
        click.echo(f"{part}: {report.samples:,} samples in {report.shards} shards, {len(report.problems)} problems")
        for note in report.notes:
            click.echo(f"  {note}")
        reports[part] = report
    if len(reports) > 1 and (shared := shared_images(*reports.values())):
        click.echo(f"images in both {' and '.join(reports)}: {shared:,}")
    if causes := set().union(*(report.causes for report in reports.values())):
        raise RsbError("\n".join(sorted(causes)))


@shards.command("stats")
@click.argument("folder")
@click.option("--classes", is_flag=True, help="Print the number of samples per class instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def shards_stats(folder: str, classes: bool, as_json: bool) -> None:
    """Print statistics of shards from their index."""
    from rsb_cluster.data.index import load_index
    from rsb_cluster.data.verify import class_samples, stats
    from rsb_cluster.storage.store import Store

    parts = _parts(folder)
    if classes:
        indices = {part: load_index(Store(part)) for part in parts}
        longest = max(indices.values(), key=lambda index: index.num_classes)
        names = [longest.classes[i] if longest.classes else str(i) for i in range(longest.num_classes)]
        counts = {part: class_samples(index).tolist() for part, index in indices.items()}
        rows = {name: {part: c[i] for part, c in counts.items() if i < len(c)} for i, name in enumerate(names)}
    else:
        found = {part: vars(stats(Store(part))) for part in parts}
        rows = {key.replace("_", " "): {part: found[part][key] for part in parts} for key in next(iter(found.values()))}
    if as_json:
        click.echo(json.dumps(rows if classes else found, indent=2))
        return
    table = new_table("", *parts)
    for key, values in rows.items():
        table.add_row(key, *(_format(values.get(part, 0)) for part in parts))
    console().print(table)


def _confirm_removals(removals: Sequence[Removal], yes: bool) -> None:
    """List the files that will be deleted; ask for confirmation if 'shards make' did not write all of them."""
    from rsb_cluster.data.split_folder import abbreviate, refuse_foreign_files

    foreign = sum(len(part.foreign) for part in removals)
    for part in removals:
        if part.own:
            log(
                f"{part.url}: will be deleted, written by 'shards make': {abbreviate(part.own)} "
                f"({len(part.own):,} files)"
            )
        if part.foreign:
            log(
                f"{part.url}: will be deleted, not written by 'shards make': {', '.join(part.foreign)} "
                f"({len(part.foreign):,} files)"
            )
    if foreign and not yes:
        if not sys.stdin.isatty():
            refuse_foreign_files(removals)
        click.confirm(f"Delete the {foreign:,} files that 'shards make' did not write?", abort=True, err=True)


def _format(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:,.10g}" if isinstance(value, int | float) else str(value)


def _samples_in(index: ShardIndex) -> str:
    return f"{index.num_samples:,} samples of {index.num_classes} classes in {len(index.shards)} shards"


def _parts(folder: str) -> list[str]:
    from rsb_cluster.data.index import INDEX_NAME
    from rsb_cluster.storage.store import Store

    store = Store(folder)
    parts = [f"{folder.rstrip('/')}/{name}" for name in ("train", "val") if store.exists(f"{name}/{INDEX_NAME}")]
    return parts or [folder]
