"""Draws docs/demo.svg: what `dltrain run jobs/image_cnn.yaml` shows on a terminal, from a real run.

python docs/picture.py
"""

from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from fcntl import ioctl
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, ROWS = 118, 40


def record(command: list[str]) -> str:
    """Everything the command writes to a terminal."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, stdin=theirs, env=env, cwd=ROOT)
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:
            break
        if not chunk:
            break
        chunks.append(chunk)
    if process.wait():
        raise SystemExit(f"{command} failed with {process.returncode}")
    return b"".join(chunks).decode(errors="replace")


def last_screen(text: str) -> list[str]:
    """The lines as they stand at the end: redrawn ones once, colours kept."""
    lines = [""]
    for piece in re.split(r"(\r\n|\n|\r|\x1b\[\d*[AK]|\x1b\[2K|\x1b\[\?25[lh])", text):
        if piece in ("\r\n", "\n"):
            lines.append("")
        elif piece == "\r" or piece.endswith("K"):
            lines[-1] = "" if piece.endswith("K") else lines[-1]
        elif re.fullmatch(r"\x1b\[\d*A", piece):
            lines.pop()
        elif not piece.startswith("\x1b[?25"):
            lines[-1] += piece
    return lines


def main() -> None:
    with tempfile.TemporaryDirectory() as runs:
        subprocess.run([sys.executable, "-m", "jobs.image_cnn", "make-data", ".data/digits"], cwd=ROOT, check=True)
        dltrain = str(Path(sys.executable).parent / "dltrain")
        text = record([dltrain, "run", "jobs/image_cnn.yaml", f"runs={runs}"])
    # The table keeps its right edge.
    shorter = " " * (len(runs) - len("runs"))
    lines = [re.sub(re.escape(runs) + r"(\S*)( +│)?", rf"runs\1{shorter}\2", line) for line in last_screen(text)]
    shown = "\n".join(line.rstrip() for line in lines).rstrip()
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi("$ dltrain run jobs/image_cnn.yaml\n" + shown))
    console.save_svg(str(ROOT / "docs" / "demo.svg"), title="make demo")


if __name__ == "__main__":
    main()
