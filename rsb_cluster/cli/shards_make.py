"""The command that makes shards."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.shards import parts_of, samples_in, workers_option
from rsb_cluster.cli.terminal import log, progress_bar

if TYPE_CHECKING:
    from rsb_cluster.data.split_folder import Removal


@click.command("make")
@click.argument("source", shell_complete=complete.folders)
@click.argument("dest", shell_complete=complete.folders)
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
@click.option(
    "--classes",
    metavar="NAMES|FILE",
    help="Only these classes, numbered in this order: names with commas between, or a file with one a line.",
)
@click.option(
    "--labels",
    "labels_file",
    type=click.Path(path_type=Path),
    metavar="TABLE",
    help="A .csv, .tsv or .parquet with the class of each image: of a folder of images, or of tars without classes.",
)
@click.option("--key-column", default="", metavar="NAME", help="Column of keys, URLs or paths of --labels.")
@click.option(
    "--config",
    default="",
    help="One of several sets of parquet files: a configuration, a folder, or a pattern.",
)
@click.option("--image-column", default="", metavar="NAME", help="Column of images in parquet files.")
@click.option(
    "--label-column",
    default="",
    metavar="NAME",
    help="Column of classes, in parquet files or in --labels.",
)
@click.option(
    "--any-count", is_flag=True, help="Accept an unexpected number of images, or missing files, of a published set."
)
@click.option(
    "--hash", "by_bytes", is_flag=True, help="Compare existing shards with the source by content, not only by size."
)
@click.option("--remake", is_flag=True, help="Replace shards in DEST that 'shards make' wrote.")
@click.option("--overwrite", is_flag=True, help="Replace all .tar files in DEST/train and DEST/val.")
@click.option("--yes", is_flag=True, help="With --overwrite: do not ask before files of others are deleted.")
@workers_option
def make(
    source: str,
    dest: str,
    root: Path | None,
    split: str | None,
    shard_samples: int,
    max_side: int | None,
    quality: int | None,
    classes: str | None,
    labels_file: Path | None,
    key_column: str,
    config: str,
    image_column: str,
    label_column: str,
    any_count: bool,
    by_bytes: bool,
    remake: bool,
    overwrite: bool,
    yes: bool,
    workers: int | None,
) -> None:
    """Make shards and their index.

    SOURCE is the name of a data set ('shards list'), a folder of images (train/ and val/, valid/ or test/, with a
    folder per class), a folder of parquet files, or the name of a torchvision data set that is on disk. DEST is a
    folder or s3:// URL, and will hold train/ and val/. Samples are shuffled, and image files are stored unchanged.
    What is left out is counted and named.

    If the command was killed, run it again to resume. If images were added or removed or have another size since, it
    refuses and asks for --remake.

    Files that this command did not write are deleted only with --overwrite: it lists them and asks for confirmation
    (or takes --yes).

    \b
    rsb-cluster shards make imagenet-1k s3://bucket/imagenet-1k --root /data/ilsvrc
    rsb-cluster shards make ./my-images data/my-images --max-side 512
    rsb-cluster shards make ./hub/beans data/beans
    rsb-cluster shards make ./img2dataset data/mine --labels labels.csv --split train
    """
    from rsb_cluster.config.class_list import read_class_list
    from rsb_cluster.data.make import plan_set
    from rsb_cluster.data.recode import QUALITY, Recode
    from rsb_cluster.data.sources import ParquetChoice, open_set, read_labels
    from rsb_cluster.storage.store import Store

    if quality is not None and max_side is None:
        raise click.UsageError("--quality needs --max-side: without it, images are stored unchanged.")
    if yes and not overwrite:
        raise click.UsageError("--yes needs --overwrite.")
    if remake + overwrite + by_bytes > 1:
        raise click.UsageError("--hash, --remake and --overwrite exclude one another: use one of them.")
    try:
        chosen = read_class_list(classes) if classes is not None else ()
    except ValueError as error:
        raise click.UsageError(f"--classes: {error}.") from error
    if key_column and labels_file is None:
        raise click.UsageError("--key-column needs --labels.")
    if labels_file is not None and (config or image_column):
        raise click.UsageError("--config and --image-column are for parquet files, not for --labels.")
    table = read_labels(labels_file, key_column, label_column) if labels_file is not None else None
    choice = ParquetChoice(config, image_column, label_column)
    data_set = open_set(source, root=root, split=split, any_count=any_count, classes=chosen, choice=choice, table=table)
    for name, part in data_set.items():
        for note in part.notes:
            log(f"{name}: {note}")
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
        for note in plan.notes(name):
            log(f"{name}: {note}")
        click.echo(f"{name}: {samples_in(index)}")
    _say_what_trains(dest)


def _say_what_trains(dest: str) -> None:
    """Say the command that trains on a data set, or what is missing."""
    from rsb_cluster.config.catalog import recipe_for_set
    from rsb_cluster.data.split_folder import read_source_record

    parts = [part.rpartition("/")[2] for part in parts_of(dest)]
    if not {"train", "val"} <= set(parts):
        missing = "val" if "train" in parts else "train"
        command = f"rsb-cluster shards make SOURCE {shlex.quote(dest)} --split {missing}"
        log(f"to train on it, make its {missing}/, too: {command}")
        return
    from rsb_cluster.storage.store import Store

    recipe = recipe_for_set(str(read_source_record(Store(dest).child("train")).get("data_set", "")))
    log(f"train on it: {shlex.join(['rsb-cluster', 'submit', '--recipe', recipe, '--data', dest])}")


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
