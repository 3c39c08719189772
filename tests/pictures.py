"""Makes the pictures of the README: ``python -m tests.pictures [FOLDER]`` ('make pictures').

The digits are trained for three epochs with two seeds, unless FOLDER has runs. What the commands then print becomes
docs/terminal.svg. Chromium shows the report, and what a screen of it has becomes docs/report.png. Takes two minutes on
two cores.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COLUMNS = 124
SCREEN = {"width": 1200, "height": 760}  # px
MAX_BYTES = 100_000  # of a picture
TRAINING = "submit --recipe digits --set schedule.epochs=3 --seeds 2 --wait"
# The commands that are shown, and how many lines of each.
COMMANDS = {
    "status": 6,
    "collect": 7,
    "submit --recipe a1 --nodes 4 --dry-run --images-per-s 1200": 8,
}


def main(folder: Path) -> None:
    """Make the pictures of the runs in a folder."""
    if not (folder / "runs").is_dir():
        _run(folder, TRAINING)
    screen = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for command, lines in COMMANDS.items():
        screen.print(Text.assemble(("$ ", "bold green"), (f"rsb-cluster {command}", "bold")))
        screen.print(_shortened(_run(folder, command), lines))
    svg = screen.export_svg(title="rsb-cluster", theme=MONOKAI, unique_id="terminal")
    _write("terminal.svg", svg.encode())
    _run(folder, "report --title digits -o report.html")
    _write("report.png", _screenshot(folder / "report.html"))


def _run(folder: Path, command: str) -> str:
    """Run a command on a terminal, and return what it prints to standard output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1"}
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rsb_cluster", *command.split()],
        cwd=folder, env=environment, stdout=its, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(its)
    said = bytearray()
    with contextlib.suppress(OSError):  # at its end there is no terminal
        while part := os.read(ours, 1 << 16):
            said += part
    os.close(ours)
    process.wait()
    return said.decode().replace("\r\n", "\n").replace(str(folder), "~").replace(f"{ROOT}/", "")


def _shortened(said: str, first: int) -> Text:
    lines = [line for line in Text.from_ansi(said).split("\n") if line.plain.strip()]
    if len(lines) > first:
        lines = [*lines[:first], Text("...", "dim")]
    for line in lines:
        line.truncate(COLUMNS)
    return Text("\n").join([*lines, Text("")])


def _screenshot(page_file: Path) -> bytes:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport=SCREEN, color_scheme="light")
        page.goto(page_file.as_uri())
        page.wait_for_timeout(1000)  # the charts are drawn
        image = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    buffer = io.BytesIO()
    image.convert("RGB").quantize(64).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _write(name: str, content: bytes) -> None:
    if len(content) > MAX_BYTES:
        raise SystemExit(f"{name} has {len(content):,} bytes, and may have {MAX_BYTES:,}")
    (DOCS / name).write_bytes(content)
    print(f"docs/{name}: {len(content):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
