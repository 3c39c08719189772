"""What can go wrong, as one tree.

    RsbError                 exit 1   operational: try again, or ask the administrator
      SubmitError                     the scheduler refused, or could not be reached
      StorageError                    a URL could not be read or written
        MissingError                  ... because nothing is there
        AccessError                   ... because we may not, or not any more
      CheckpointError                 missing, damaged, or of another run
      NewerVersionError               a file of ours says what this version does not know
      DataError                       shards missing, changed, too few, or too many bad samples
      ConfigError            exit 2   the user's file or flag is wrong

A message says what, where and what next, in that order. Anything else that is raised is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class RsbError(Exception):
    """An error that a user can understand and act on."""

    exit_code = 1


class SubmitError(RsbError):
    """The scheduler refused the job, or could not be reached."""


class StorageError(RsbError):
    """A URL could not be read or written."""


class MissingError(StorageError):
    """Nothing is at the URL."""


class AccessError(StorageError):
    """The URL may not be used: no permission, or credentials that are wrong or have expired."""


class CheckpointError(RsbError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class NewerVersionError(RsbError):
    """A file was written by a newer version of this package; ``config.schema`` says what tells."""


class DataError(RsbError):
    """Shards are missing, changed since they were indexed, too few, or hold too many bad samples."""


class ConfigError(RsbError):
    """The user's file or flag is wrong."""

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
