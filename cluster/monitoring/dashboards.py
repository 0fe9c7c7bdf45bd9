"""Grafana's dashboards, made from code and kept beside it: dashboards/*.json.

    python -m cluster.monitoring.dashboards            # writes them anew
    python -m cluster.monitoring.dashboards --check    # exit 1 where a file is not what the code makes

A test makes the same comparison. What the panels show is in boards_training.py and boards_machines.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "RAY_UIDS", "main", "make"]

FOLDER = Path(__file__).with_name("dashboards")
# Ray writes these itself, under these uids.
RAY_UIDS = {"rayDefaultDashboard": "Ray: nodes and tasks", "rayTrainDashboard": "Ray: Train's view of nodes"}


def make() -> dict[str, str]:
    """File name -> text of every dashboard.

    Raises:
        ImportError: grafana-foundation-sdk is not installed.
    """
    from cluster.monitoring import boards_machines as machines
    from cluster.monitoring import boards_training as training

    boards = {
        "overview": training.overview,
        "learning": training.learning,
        "time": training.time,
        "ranks": training.ranks,
        "data": machines.data,
        "checkpoints": machines.checkpoints,
        "gpus": machines.gpus,
        "cluster": machines.hosts,
    }
    return {f"dltrain-{name}.json": board(_links()).json() for name, board in boards.items()}


def _links() -> list[Any]:
    from cluster.monitoring.panels import link_to, links_by_tag

    return [links_by_tag("dltrain"), *(link_to(title, f"/d/{uid}") for uid, title in RAY_UIDS.items())]


def main() -> int:
    """Writes or compares the files; returns the exit code."""
    texts = make()
    if sys.argv[1:] == ["--check"]:
        stale = [name for name, text in texts.items() if not _is(FOLDER / name, text)]
        print(f"not what the code makes: {', '.join(stale)}" if stale else "all as the code makes them")
        return int(bool(stale))
    FOLDER.mkdir(exist_ok=True)
    for name, text in texts.items():
        (FOLDER / name).write_text(text)
        print(f"{FOLDER / name}: {len(text):,} bytes")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
