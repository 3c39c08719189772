"""Sources of samples, and the files of a folder."""

import time
from dataclasses import dataclass

from rsb_cluster.data.sources import DataSource
from rsb_cluster.errors import DataError
from tests.unit import formats


@dataclass(frozen=True)
class Numbered:
    """Reads entries that are numbers; can be sent to another process."""

    size: int
    pause_s: float = 0.0
    fails_at: int = -1

    def __call__(self, i):
        time.sleep(self.pause_s)
        if i == self.fails_at:
            raise DataError("killed")
        return f"k{i:03d}", bytes([i % 256]) * (self.size + i), "jpg", i % 3


def some(n=10, size=100, **how):
    """A source of so many numbered samples."""
    return DataSource(f"{n} samples", ("a", "b", "c"), range(n), Numbered(size, **how))


def source_with(samples, **how):
    """A source of the samples that are given."""
    return DataSource("given", (), range(len(samples)), samples.__getitem__, **how)


def contents(folder):
    """All files below a folder, by their paths."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def put(folder, **files):
    """Write files into a folder, and return what is in it."""
    for name, content in files.items():
        formats.write(folder / name, content)
    return contents(folder)
