"""Weights & Biases: offline, as files that `wandb sync` uploads, or online.

trackers: {wandb: {mode: offline, project: digits}}

Its key comes from WANDB_API_KEY or the user's netrc file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dltrain.artifact import Artifact
from dltrain.observing.journal import is_local
from dltrain.observing.trackers.base import TrackedRun, flat
from dltrain.spec import WandbSpec

__all__ = ["Wandb"]


class Wandb:
    """One run of W&B for all starts of ours, by its id; it refuses steps that go back."""

    name = "Weights & Biases"

    def __init__(self, spec: WandbSpec) -> None:
        self._spec = spec
        self._files = tempfile.TemporaryDirectory(prefix="dltrain-wandb-")

    def start(self, run: TrackedRun) -> int:
        if self._spec.mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        directory = self._spec.dir or (run.store.root if is_local(run.store) else os.getcwd())
        Path(directory).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True
        )
        self._run: Any = wandb.init(
            project=self._spec.project,
            entity=self._spec.entity,
            id=run.id,
            name=run.name,
            mode=self._spec.mode,
            resume="allow" if self._spec.mode == "online" else None,
            dir=directory,
            config=dict(flat(run.spec)),
            settings=settings,
        )
        # Offline nothing can be asked: what was told is what the note says.
        return run.told

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def artifact(self, step: int, name: str, artifact: Artifact) -> None:
        shown = self._shown(artifact)
        if shown is not None:
            self._run.log({name: shown}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self, status: str) -> None:
        self._run.finish(exit_code=int(status == "failed"))
        self._files.cleanup()

    def _shown(self, artifact: Artifact) -> Any:
        """As W&B's own kind; None for what it has none for."""
        kind = artifact.media_type.partition("/")[0]
        with tempfile.NamedTemporaryFile(dir=self._files.name, suffix=artifact.suffix, delete=False) as file:
            file.write(artifact.data)
        if artifact.media_type == "image/gif":
            return self._wandb.Video(file.name, caption=artifact.caption, format="gif")
        if kind == "image":
            return self._wandb.Image(file.name, caption=artifact.caption)
        if kind == "audio":
            return self._wandb.Audio(file.name, caption=artifact.caption)
        if artifact.media_type == "text/html":
            return self._wandb.Html(artifact.data.decode(errors="replace"), inject=False)
        return artifact.data.decode(errors="replace") if kind == "text" else None
