"""The commands that index, verify and describe shards; `shards make` has a module of its own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.terminal import console, log, new_table, progress_bar
from rsb_cluster.errors import RsbError, plural

if TYPE_CHECKING:
    from rsb_cluster.data.index import ShardIndex


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


@shards.command("index")
@click.argument("folder", shell_complete=complete.folders)
@click.option(
    "--image-key",
    "image_keys",
    multiple=True,
    metavar="EXTENSION",
    help="The image of a sample that has several files of images, such as jpg or input.png. If given more than once, "
    "the first that the sample has.",
)
@click.option(
    "--labels",
    "labels_file",
    type=click.Path(path_type=Path),
    metavar="TABLE",
    help="A .csv, .tsv or .parquet with the class of each image, in place of those in the shards.",
)
@click.option("--key-column", default="", metavar="NAME", help="With --labels: the column of keys, URLs or paths.")
@click.option("--label-column", default="", metavar="NAME", help="With --labels: the column of classes.")
@click.option(
    "-o", "--output", default="", metavar="FOLDER", help="Folder of the index.  [default: that of the shards]"
)
@click.option("--any-count", is_flag=True, help="Accept a folder that lacks some shards of its own list.")
@workers_option
def shards_index(
    folder: str,
    image_keys: tuple[str, ...],
    labels_file: Path | None,
    key_column: str,
    label_column: str,
    output: str,
    any_count: bool,
    workers: int | None,
) -> None:
    """Index existing .tar files. FOLDER is one part of a data set (…/train or …/val), or a whole set.

    In a whole set the shards of train and val are told apart by timm's _info.json, by words in their names
    (imagenet1k-train-0000.tar), or by their folders. The indices are written to train/ and val/ below FOLDER, or below
    -o FOLDER; they name the folder of the shards, which are neither moved nor written to.

    Files that belong to no sample are left out and counted: hidden ones, those of systems and tools, names without a
    dot. A sample with two images, or with a link in place of a file, is refused, and the message names it.

    \b
    rsb-cluster shards index s3://bucket/theirs/train
    rsb-cluster shards index s3://public/imagenet-1k-wds -o data/imagenet-1k
    rsb-cluster shards index ./img2dataset/train --labels labels.csv
    """
    from rsb_cluster.data.published import find_parts, index_set
    from rsb_cluster.data.sources import read_labels
    from rsb_cluster.storage.store import Store

    if (key_column or label_column) and labels_file is None:
        raise click.UsageError("--key-column and --label-column need --labels.")
    table = read_labels(labels_file, key_column, label_column) if labels_file is not None else None
    found = find_parts(Store(folder), any_count=any_count)
    for note in found.notes:
        log(f"{folder}: {note}")
    said: list[str] = []
    with progress_bar("indexing") as progress:
        made = index_set(
            found,
            Store(output) if output else None,
            workers=workers,
            image_keys=image_keys,
            table=table,
            progress=progress,
            say=said.append,
        )
    for note in said:
        log(note)
    for part, index in made.items():
        click.echo(f"{part}: {samples_in(index)}" if part else samples_in(index))


@shards.command("info")
@click.argument("folder", shell_complete=complete.folders)
def shards_info(folder: str) -> None:
    """Write timm's _info.json for indexed shards.

    With it timm reads them, as a data set 'wds/'. FOLDER is a whole set, or one part.
    """
    from rsb_cluster.data.published import INFO_NAME, write_info
    from rsb_cluster.storage.store import Store

    store = Store(folder)
    write_info(store)
    click.echo(store.locate(INFO_NAME))


@shards.command("labels")
@click.argument("name", type=click.Choice(["real"]))
@click.argument("folder", shell_complete=complete.folders)
@click.option("--from", "file", type=click.Path(path_type=Path), help="The authors' real.json.  [default: timm's copy]")
def shards_labels(name: str, folder: str, file: Path | None) -> None:
    """Add ReaL labels to existing shards of ImageNet's validation set, in FOLDER.

    They are the reassessed labels of Beyer et al. (2020), of which an image may have several.

    'shards make imagenet-1k' adds them itself. Images are matched by the number in the key (ILSVRC2012_val_00000001).
    """
    from rsb_cluster.data.index import load_index
    from rsb_cluster.data.labels import real_labels, renew_labels
    from rsb_cluster.storage.store import Store

    store = Store(folder)
    store.check_not_read_only("labels")
    index = load_index(store)
    found = real_labels((index.key(i) for i in range(index.num_samples)), file)
    renew_labels(store, name, found)
    click.echo(f"{sum(map(bool, found.labels.values())):,} of {index.num_samples:,} images have labels '{name}'")


@shards.command("verify")
@click.argument("folder", shell_complete=complete.folders)
@click.option("--decode", is_flag=True, help="Also decode every image.")
@workers_option
def shards_verify(folder: str, decode: bool, workers: int | None) -> None:
    """Verify shards. Sizes, checksums and keys are compared with the index, and duplicate images are counted."""
    from rsb_cluster.data.verify import shared_images, verify
    from rsb_cluster.storage.store import Store

    reports = {}
    for part in _parts_to_read(folder):
        with progress_bar(f"verifying {part}") as progress:
            report = verify(Store(part), decode=decode, workers=workers, progress=progress)
        for problem in report.problems:
            click.echo(problem)
        counts = (
            f"{plural(report.samples, 'sample')} in {plural(report.shards, 'shard')}, "
            f"{plural(len(report.problems), 'problem')}"
        )
        click.echo(f"{part}: {counts}")
        for note in report.notes:
            click.echo(f"  {note}")
        reports[part] = report
    if len(reports) > 1 and (shared := shared_images(*reports.values())):
        click.echo(f"images in both {' and '.join(reports)}: {shared:,}")
    if causes := set().union(*(report.causes for report in reports.values())):
        raise RsbError("\n".join(sorted(causes)))


@shards.command("stats")
@click.argument("folder", shell_complete=complete.folders)
@click.option("--classes", is_flag=True, help="Print the number of samples per class instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def shards_stats(folder: str, classes: bool, as_json: bool) -> None:
    """Print statistics of shards from their index."""
    from rsb_cluster.data.index import load_index
    from rsb_cluster.data.verify import class_samples, stats
    from rsb_cluster.storage.store import Store

    parts = _parts_to_read(folder)
    if classes:
        indices = {part: load_index(Store(part)) for part in parts}
        longest = max(indices.values(), key=lambda index: index.num_classes)
        counts = {part: class_samples(index).tolist() for part, index in indices.items()}
        rows = {
            name: {part: c[i] for part, c in counts.items() if i < len(c)} for i, name in enumerate(longest.class_names)
        }
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


def _parts_to_read(folder: str) -> list[str]:
    """Return the indexed parts of a data set, and say which part is left out as it has no index."""
    from rsb_cluster.data.index import shard_names
    from rsb_cluster.storage.store import Store

    parts = parts_of(folder)
    for name in ("train", "val") if parts != [folder] else ():
        part = f"{folder.rstrip('/')}/{name}"
        if part not in parts and shard_names(Store(part)):
            log(f"{part} has no index, and is left out. Make it: rsb-cluster shards index {shlex.quote(part)}")
    return parts


def _format(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:,.10g}" if isinstance(value, int | float) else str(value)


def samples_in(index: ShardIndex) -> str:
    """Return how many samples, classes and shards an index has."""
    return (
        f"{plural(index.num_samples, 'sample')} of {plural(index.num_classes, 'class', 'classes')} in "
        f"{plural(len(index.shards), 'shard')}"
    )


def parts_of(folder: str) -> list[str]:
    """Return the indexed parts (train, val) of a data set; or the folder itself, if it is one part."""
    from rsb_cluster.data.index import INDEX_NAME
    from rsb_cluster.storage.store import Store

    store = Store(folder)
    parts = [f"{folder.rstrip('/')}/{name}" for name in ("train", "val") if store.exists(f"{name}/{INDEX_NAME}")]
    return parts or [folder]
