"""Helper processes: modules of this package that import torch, run for a process that must not or need not.

The request goes to the helper's standard input, its messages come back as lines of JSON through a pipe of their own:
native libraries print to standard output whatever they like (``NCCL_DEBUG=INFO`` does), and no such line may pass for
a message. What a helper prints goes to standard error, or into the error if the helper fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rsb_cluster.errors import ConfigError, RsbError
from rsb_cluster.storage.redact import redact
from rsb_cluster.subprocesses.interpreter import interpreter

Message = dict[str, Any]
Send = Callable[..., None]  # send(done=1, total=2): the fields of a message

_END = "end"  # of the last message: that the work was done, or the error


class Helper:
    """A running helper process."""

    def __init__(
        self, module: str, request: Any, *, doing: str, env: Mapping[str, str] | None = None, show: bool = False
    ) -> None:
        """Start a module whose main function calls `serve`.

        Args:
            module: The module.
            request: Plain values, for the module's work.
            doing: What the helper does, for messages: ``the export``.
            env: Its environment; None: that of this process.
            show: Show what it prints, on standard error; else it is part of the error if the helper fails.
        """
        self._doing, self._request = doing, request
        self._printed = None if show else tempfile.TemporaryFile()  # noqa: SIM115 - closed with the helper
        receiving, sending = os.pipe()
        self._pipe = os.fdopen(receiving, encoding="utf-8", errors="replace")
        try:
            self._process = subprocess.Popen(
                [*interpreter(), "-m", module, str(sending)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=self._printed or 2,
                stderr=self._printed,
                pass_fds=(sending,),
                text=True,
            )
        finally:
            os.close(sending)

    def messages(self) -> Iterator[Message]:
        """Send the request; yield the messages until the helper has ended.

        Raises:
            ConfigError: The helper says that the user's file or flag is wrong.
            RsbError: The helper says that something else failed, or it died, or sent something that is no message.
        """
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stdin:
                json.dump(self._request, stdin)
        except BrokenPipeError:
            pass  # it has ended already; its exit code says more
        ended = False
        for line in self._pipe:
            message = _parse(line)
            if message is None:
                raise RsbError(f"{self._doing} failed: a helper process sent {line[:200]!r}, which is no message.")
            if not (ended := _END in message):
                yield message
            elif "error" in message:
                kind = ConfigError if message["exit_code"] == ConfigError.exit_code else RsbError
                raise kind(message["error"])
        code = self._process.wait()
        if code or not ended:
            raise RsbError(f"{self._doing} failed: a helper process {_death(code)}. {self._output()}")

    def kill(self) -> None:
        """Kill the process if it still runs, which ends its messages."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill the process if it still runs, and close its pipe."""
        self.kill()
        self._pipe.close()
        if self._printed:
            self._printed.close()

    def _output(self) -> str:
        if self._printed is None:
            return "See its output above."
        self._printed.seek(0)
        return f"Its output:\n{redact(self._printed.read().decode(errors='replace').strip())}"


def ask(module: str, request: Any, *, doing: str) -> Message:
    """Run a helper that sends one message; return the message. Arguments and errors are those of `Helper`."""
    helper = Helper(module, request, doing=doing)
    try:
        answer: Message = {}
        for message in helper.messages():
            answer = message
        return answer
    finally:
        helper.close()


def serve(work: Callable[[Any, Send], None]) -> None:
    """Run the work of a helper process, as the main function of its module; an RsbError is reported to the parent.

    Args:
        work: Called with the request and the function that sends a message.
    """
    warnings.simplefilter("ignore")
    number = int(sys.argv[1])
    os.set_inheritable(number, False)  # the pipe ends with this process, not with one that it starts
    with os.fdopen(number, "w", encoding="utf-8") as pipe:

        def send(**message: Any) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        try:
            work(json.load(sys.stdin), send)
        except RsbError as error:
            send(**{_END: True, "error": redact(str(error)), "exit_code": error.exit_code})
            sys.exit(error.exit_code)
        send(**{_END: True})


def _parse(line: str) -> Message | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _death(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code}" if code else "ended before its work was done"
