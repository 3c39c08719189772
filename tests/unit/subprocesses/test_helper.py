"""Messages of helper processes are their own, whatever else is printed, and their death is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsb_cluster.errors import ConfigError, RsbError
from rsb_cluster.subprocesses.helper import Helper, ask

# Prints before and after it serves, as native libraries do when they are loaded and when a process ends.
MODULE = """
import atexit, os, signal, sys
os.write(1, b'host:1:1 [0] NCCL INFO loaded\\n')
from rsb_cluster.errors import ConfigError, RsbError
from rsb_cluster.subprocesses.helper import serve

def work(request, send):
    os.write(1, b'{"answer": "of a library"}\\n')
    print("no newline", end="")
    {work}

atexit.register(lambda: os.write(1, b"\\xff NCCL INFO the end\\n"))
serve(work)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "helper_of_test"


def works(folder: Path, work: str) -> None:
    (folder / "helper_of_test.py").write_text(MODULE.replace("\\\\", "\\").replace("{work}", work))


def test_lines_of_others_are_no_messages(tmp_path: Path, module: str) -> None:
    works(tmp_path, "send(answer=request * 2)")
    assert ask(module, "x" * 100_000, doing="the test") == {"answer": "x" * 200_000}


def test_several_messages_and_what_is_printed_meanwhile(
    tmp_path: Path, module: str, capfd: pytest.CaptureFixture[str]
) -> None:
    works(tmp_path, "[send(number=i) for i in range(request)]")
    helper = Helper(module, 3, doing="the test", show=True)
    assert list(helper.messages()) == [{"number": 0}, {"number": 1}, {"number": 2}]
    helper.close()
    printed = capfd.readouterr()
    assert printed.out == "" and "NCCL INFO loaded" in printed.err and "NCCL INFO the end" in printed.err


@pytest.mark.parametrize(
    ("work", "kind", "says"),
    [
        ("raise RsbError('the disk is full')", RsbError, "^the disk is full$"),
        ("raise ConfigError('no such model')", ConfigError, "^no such model$"),
        (
            "raise KeyError('a bug')",
            RsbError,
            "the test failed: .* exited with code 1.*KeyError: 'a bug'",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", RsbError, "the test failed: a helper process was ended by SIGKILL"),
        ("sys.stdout.flush(); os._exit(0)", RsbError, "ended before its work was done.*NCCL INFO loaded.*no newline"),
        ("os._exit(3)", RsbError, "exited with code 3"),
        ("os.write(int(sys.argv[1]), b'rubbish\\n')", RsbError, "sent 'rubbish.n', which is no message"),
        ("os.write(int(sys.argv[1]), b'7\\n')", RsbError, "which is no message"),
        ("raise RsbError('s3://key:secret@host')", RsbError, r"s3://\*\*\*@host"),
    ],
)
def test_a_death_is_an_error(tmp_path: Path, module: str, work: str, kind: type[RsbError], says: str) -> None:
    works(tmp_path, work)
    with pytest.raises(kind, match=f"(?s){says}") as raised:
        ask(module, None, doing="the test")
    assert type(raised.value) is kind


def test_one_that_reads_no_request_is_an_error(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("raise SystemExit(5)")
    with pytest.raises(RsbError, match="exited with code 5"):
        ask(module, "x" * 1_000_000, doing="the test")
