"""The hierarchy of errors.

    RsbError                 exit 1   operational: try again, or ask the administrator
      SubmitError                     the scheduler refused, or could not be reached
        RefusedError                  ... it has certainly not taken the job
      StorageError                    a URL could not be read or written
        MissingError                  ... because it does not exist
        AccessError                   ... because permission is missing or credentials have expired
      CheckpointError                 missing, damaged, or of another run
      NewerVersionError               a file was written by a newer version of this package
      DataError                       shards missing, changed, too few, or too many bad samples
      ConfigError            exit 2   the user's file or flag is wrong

A message says what happened, where, and what to do next. Any other exception is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class RsbError(Exception):
    """An error that a user can understand and act on."""

    exit_code = 1


class SubmitError(RsbError):
    """The scheduler refused the job, or could not be reached."""


class RefusedError(SubmitError):
    """The scheduler refused the job, and has certainly not queued it."""


class StorageError(RsbError):
    """A URL could not be read or written."""


class MissingError(StorageError):
    """The URL does not exist."""


class AccessError(StorageError):
    """Access to the URL was denied: no permission, or credentials that are wrong or have expired."""


class CheckpointError(RsbError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class NewerVersionError(RsbError):
    """A file was written by a newer version of this package; see ``config.schema``."""


class DataError(RsbError):
    """Shards are missing, changed since they were indexed, too few, or hold too many bad samples."""


class ConfigError(RsbError):
    """The user's file or flag is wrong."""

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def plural(number: int, one: str, many: str = "") -> str:
    """Return ``1 run`` or ``2 runs``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def is_text(name: str) -> bool:
    """Whether a name of a file, or an argument, can be written as UTF-8; other bytes are surrogates in Python."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def expand_home(path: str | Path) -> Path:
    """Return a path with ``~`` or ``~user`` replaced. Raises ConfigError if the system does not know that home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"cannot use {path}: this system knows no home folder for {Path(path).parts[0]}. Write the path in full."
        ) from error
