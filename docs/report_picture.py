"""Draws docs/report.png: the report of a real run of jobs/image_cnn.yaml, one of whose workers is killed on the way.

python docs/report_picture.py                    # needs chromium and Pillow
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 1280, 2700
# Down to the faults; the spec follows.
SHOWN = 2440
KILL_AT = 180


def state(run: Path) -> dict[str, object]:
    try:
        found: dict[str, object] = json.loads((run / "state.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found


def train(command: str, runs: Path) -> Path:
    """A run, with a fault in its midst."""
    run = runs / "image-cnn"
    process = subprocess.Popen([command, "run", "jobs/image_cnn.yaml", f"runs={runs}"], cwd=ROOT)
    while int(str(state(run).get("step", 0))) < KILL_AT:
        time.sleep(0.1)
        if process.poll() is not None:
            raise SystemExit("the run ended early")
    workers = state(run)["workers"]
    assert isinstance(workers, list)
    os.kill(workers[1]["pid"], signal.SIGKILL)
    if process.wait():
        raise SystemExit("the run failed")
    return run


def picture(page: Path, dark: bool, target: Path) -> Image.Image:
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", scheme]
    size = f"--window-size={WIDTH},{HEIGHT}"
    command = ["chromium", *options, size, f"--screenshot={target}", page.as_uri()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Image.open(target).convert("RGB")


def main() -> None:
    dltrain = str(Path(sys.executable).parent / "dltrain")
    with tempfile.TemporaryDirectory() as directory:
        runs = Path(directory, "runs")
        subprocess.run([sys.executable, "-m", "jobs.image_cnn", "make-data", ".data/digits"], cwd=ROOT, check=True)
        run = train(dltrain, runs)
        page = Path(directory, "report.html")
        subprocess.run([dltrain, "report", str(run), "--to", str(page)], cwd=ROOT, check=True)
        page.write_text(page.read_text().replace(str(runs), "runs"))
        light, dark = (picture(page, dark, Path(directory, f"{dark}.png")) for dark in (False, True))
    # One half in light, the other in dark.
    sheet = light.crop((0, 0, WIDTH, SHOWN))
    sheet.paste(dark.crop((WIDTH // 2, 0, WIDTH, SHOWN)), (WIDTH // 2, 0))
    sheet.save(ROOT / "docs" / "report.png", optimize=True)


if __name__ == "__main__":
    main()
