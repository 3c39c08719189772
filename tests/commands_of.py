"""The commands of the documentation, as a reader types them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commands_of(document: str) -> list[str]:
    """Return the commands after ``$`` in the console blocks of a document, without their comments."""
    found: list[str] = []
    for block in re.findall(r"```console\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL):
        # A comment may stand behind the backslash of a line that goes on, or at the end.
        lines = [re.sub(r"\s+#\s.*$", "", line) for line in re.sub(r"\\\n\s+", "", block).splitlines()]
        for line in lines:
            if line.startswith("$ "):
                found += [command.strip() for command in line[2:].split("; ")]
    return found


def as_printed(command: str, document: str = "README.md") -> list[str]:
    """Return the words after ``rsb-cluster`` of a command that stands so in a document."""
    assert command in commands_of(document), f"{document} has no longer: {command}"
    return shlex.split(command)[1:]
