"""A rank's log: on standard error, which the scheduler stores, and in the run's folder when the rank exits."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator

from rsb_cluster.errors import StorageError
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.storage.redact import redact
from rsb_cluster.storage.store import Store

COPY_S = 10.0  # between two copies of a growing log


class LogFile:
    """A local file that is copied into the run's folder, which may be an object store.

    Attributes:
        file: The local file. It has no name, so a killed rank leaves no file.
        name: Path in the run's folder; empty: no copy is made, as the attempt has no number yet.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.name = ""
        self.file = tempfile.TemporaryFile("w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self._ended = threading.Event()
        self._copier: threading.Thread | None = None

    def keep_copying(self) -> None:
        """Start to copy the log whenever it has grown, so that it can be followed if nodes share no file system."""
        self._copier = threading.Thread(target=self._copy_as_it_grows, name="log", daemon=True)
        self._copier.start()

    def _copy_as_it_grows(self) -> None:
        copied = 0
        while not self._ended.wait(COPY_S):
            content = self._content()
            if self.name and len(content) > copied:
                with contextlib.suppress(StorageError):
                    if not self._store.exists("spec.json"):
                        continue
                    self._store.write_bytes(self.name, content)
                    copied = len(content)

    def copy(self) -> None:
        """Make the last copy."""
        self._ended.set()
        if self._copier is not None:
            self._copier.join()
        if self.name and self._store.exists("spec.json"):  # a deleted run must not be made again
            self._store.write_bytes(self.name, self._content())

    def _content(self) -> bytes:
        return os.pread(self.file.fileno(), os.fstat(self.file.fileno()).st_size, 0)


class _Redacting(logging.Formatter):
    """Removes secrets that errors of other libraries may quote, such as a signed URL. Times are in UTC."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@contextlib.contextmanager
def logging_to(store: Store, ranks: Ranks) -> Iterator[LogFile]:
    """Log the package's messages while the block runs.

    Args:
        store: The run's folder.
        ranks: The rank of this process.
    """
    log_file = LogFile(store)
    formatter = _Redacting(f"%(asctime)s %(levelname).1s rank{ranks.rank} %(message)s", datefmt="%Y-%m-%d %H:%M:%SZ")
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.StreamHandler(log_file.file)]
    root = logging.getLogger("rsb_cluster")
    root.setLevel(logging.INFO)
    root.propagate = False
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    warnings.filterwarnings("ignore", message=".*Palette images with Transparency.*")
    try:
        yield log_file
    finally:
        for handler in handlers:
            handler.flush()
            root.removeHandler(handler)
        try:
            log_file.copy()
        except StorageError as error:
            sys.stderr.write(f"the log could not be copied: {error}\n")
        log_file.file.close()
