"""Running the user's ``job.notify_command`` when a run has finished, failed for good, or exceeded its budget.

It runs on a node, as the last thing that a rank does, in a process of its own (`rsb_cluster.results.notify`), which a
time limit ends. Whatever it does, the run has its result and its exit code already.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import tempfile
from typing import IO, Literal

from rsb_cluster.errors import StorageError
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.redact import redact
from rsb_cluster.subprocesses.interpreter import interpreter

log = logging.getLogger(__name__)

# Started by name: it makes the row of the table, which stands above this folder.
_PROGRAM = "rsb_cluster.results.notify"
# Less than the time after which the ranks of an ended job are killed (processes.EXIT_TIMEOUT_S, srun --wait).
LIMIT_S = 25.0
_SAID_BYTES = 2000

State = Literal["finished", "failed", "budget exceeded"]


def notify(run: Run, ranks: Ranks, command: str, state: State, reason: str) -> None:
    """Run the user's command once for the end of a job, whichever ranks call this; raises nothing.

    Args:
        run: The run.
        ranks: The rank that calls.
        command: Shell words; empty: there is none.
        state: How the run ended.
        reason: Why.
    """
    if not command or not _is_first(run, ranks):
        return
    request = {"run_url": run.url, "command": command, "state": state, "reason": redact(reason)}
    try:
        with tempfile.TemporaryFile() as output:
            _run(json.dumps(request).encode(), output)
    except OSError as error:
        log.warning("job.notify_command could not be started: %s", error)


def _is_first(run: Run, ranks: Ranks) -> bool:
    """Whether no other rank of this job has notified; rank 0 does if the run's folder does not tell."""
    try:
        if run.exists():  # a deleted folder must not be created again
            return run.store.create_json(f"attempts/notified-{ranks.job_id}.json", {"rank": ranks.rank})
    except StorageError as error:
        log.warning("%s", error)
    return ranks.rank == 0


def _run(request: bytes, output: IO[bytes]) -> None:
    process = subprocess.Popen(
        [*interpreter(), "-m", _PROGRAM], stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
    )
    try:
        process.communicate(request, timeout=LIMIT_S)
        ended = f"ended with exit code {process.returncode}" if process.returncode else "was run"
    except subprocess.TimeoutExpired:
        ended = f"did not end within {LIMIT_S:.0f} s, and was killed"
    with contextlib.suppress(ProcessLookupError):  # also what the command has started and left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    output.seek(max(0, output.seek(0, os.SEEK_END) - _SAID_BYTES))
    said = redact(output.read().decode(errors="replace").strip())
    log.log(
        logging.INFO if ended == "was run" else logging.WARNING,
        "job.notify_command %s%s", ended, f":\n{said}" if said else "",
    )  # fmt: skip
