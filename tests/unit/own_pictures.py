"""Shards of a user's own pictures: three classes, the third of which has few."""

from pathlib import Path

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.storage.store import Store
from tests.unit.formats import picture, write

CLASSES = {"cat": 60, "dog": 36, "owl": 4}  # training images of each


def folders_of_pictures(folder: Path, *, px: int = 24) -> Path:
    """Write train/<class>/*.jpg and val/<class>/*.jpg."""
    for number, (name, count) in enumerate(CLASSES.items()):
        for part, images, first in (("train", count, 0), ("val", 4, 500)):
            for i in range(images):
                write(folder / part / name / f"{i}.jpg", picture(1000 * number + first + i, px=px))
    return folder


def shards_of_pictures(folder: Path) -> Path:
    """Make their shards in ``folder/photos``."""
    made = folder / "photos"
    make_set(open_set(str(folders_of_pictures(folder / "pictures"))), Store(made))
    return made
