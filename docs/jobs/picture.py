"""The pictures of jobs whose work is text: what a command printed, as a PNG.

dltrain predict lm-rnn --text "The interpreter" | python docs/jobs/picture.py docs/jobs/lm_rnn.png
"""

from __future__ import annotations

import sys
import textwrap

from PIL import Image, ImageDraw, ImageFont

COLUMNS, SIZE = 84, 15


def main(path: str) -> None:
    lines = [part for line in sys.stdin.read().strip().splitlines() for part in textwrap.wrap(line, COLUMNS) or [""]]
    font = ImageFont.load_default(SIZE)
    canvas = Image.new("RGB", (COLUMNS * 8 + 32, len(lines) * 21 + 24), "white")
    pen = ImageDraw.Draw(canvas)
    for row, line in enumerate(lines):
        pen.text((16, 12 + row * 21), line, "#1f5fa8" if line.startswith(">") else "#222222", font)
    canvas.quantize(32).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
