"""What a reader of docs/tutorial.md edits, so that a few small pictures are trained on CPUs."""

from __future__ import annotations

from pathlib import Path

INSTALLATION = ("python3 ", "venv/bin/pip ", "source ")  # test_wheel.py installs in an empty environment
RECIPE = {
    "epochs = 100 ": "epochs = 3 ", "warmup_epochs = 5 ": "warmup_epochs = 1 ", "resolution = 160 ": "resolution = 32 ",
    "resolution = 224 ": "resolution = 32 ", 'amp = "fp16" ': 'amp = "off" ',
}  # fmt: skip

JOB = {"tasks_per_node = 1\n": "tasks_per_node = 2\n", "log_every_steps = 20\n": "log_every_steps = 1\n"}


def edit(path: Path, changes: dict[str, str]) -> None:
    """Replace texts that are in a file exactly once."""
    text = path.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
