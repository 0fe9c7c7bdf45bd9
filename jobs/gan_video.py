"""Clips of digits that move as they are asked to: a conditional GAN, judged by a classifier of actions.

python -m jobs.gan_video make-data .data/gan_video        # and trains the classifier: judge.safetensors
dltrain run jobs/gan_video.yaml
dltrain predict gan-video --count 8 --out made            # a GIF of each action
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Keys, Sum, Task
from jobs.common import judge
from jobs.common.clip_gan import NOISE, ClipDiscriminator, ClipGenerator
from jobs.common.clips import ACTIONS, FRAMES, SIZE, clip_splits, frames_of
from jobs.common.data import main, write_splits
from jobs.common.figures import Goal
from jobs.common.frechet import frechet, moments
from jobs.common.slopes import r1
from jobs.video_cnn import FPS, ZOOM, VideoCnn

GOALS = (
    Goal("clips recognised as what was asked for", "recognised", 0.8),
    Goal("actions of which most clips are recognised", "actions", len(ACTIONS)),
)
# One row in so many of a batch is penalised, as much stronger: the mean is the same.
PENALISED = 4


class GanVideo(Task):
    """Two networks that train each other; R1 penalty (Mescheder et al., 2018)."""

    columns = ("clip", "action")

    def __init__(self, judge: str, width: int = 16, penalty: float = 0.1) -> None:
        self.url, self.width, self.penalty = judge, width, penalty

    @cached_property
    def judge(self) -> nn.Sequential:
        return judge.load(self.url, _classifier())

    def build(self) -> dict[str, nn.Module]:
        return {"discriminator": ClipDiscriminator(self.width), "generator": ClipGenerator(self.width)}

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        real = frames_of(rows["clip"].to_pylist(), (FRAMES, SIZE, SIZE)) / np.float32(255)
        action = torch.from_numpy(rows["action"].to_numpy().astype(np.int64))
        # Drawn by row, so that any number of workers makes the same.
        rngs = [keys.rng(row) for row in range(len(real))]
        noise = torch.from_numpy(np.stack([rng.normal(size=NOISE) for rng in rngs])).float()
        chance = torch.from_numpy(np.stack([rng.random(real.shape[1:], np.float32) for rng in rngs]))
        chosen = torch.from_numpy((keys.ids + keys.epochs) % PENALISED == 0)
        return Batch(len(real), real=torch.from_numpy(real), action=action, noise=noise, chance=chance, chosen=chosen)

    def step(self, networks: Any, batch: Batch) -> dict[str, torch.Tensor]:
        d, g = networks["discriminator"], networks["generator"]
        if networks.turn == "generator":
            return {"generator": F.softplus(-d(g(batch.noise, batch.action), batch.action)).mean()}
        with torch.no_grad():
            made = g(batch.noise, batch.action)
        loss = (F.softplus(-d(batch.real, batch.action)) + F.softplus(d(made, batch.action))).mean()
        chosen = batch.chosen
        slopes = r1(lambda clips: d(clips, batch.action[chosen]), batch.real[chosen], len(made), PENALISED)
        return {"discriminator": loss + self.penalty / 2 * slopes}

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        made = model["generator"](batch.noise, batch.action)
        asked = F.one_hot(batch.action, len(ACTIONS))
        sums = {"asked": Sum(asked.sum(0).double().cpu().numpy(), batch.count)}
        for kind, clips in {"made": made, "real": batch.real, "noise": batch.chance}.items():
            features, chances = judge.judged(self.judge, clips[:, None])
            right = asked[chances.argmax(1) == batch.action].sum(0)
            sums |= moments(kind, features) | {f"{kind} right": Sum(right.double().cpu().numpy(), batch.count)}
        return sums

    def metrics(self, means: Mapping[str, Any]) -> dict[str, float]:
        by_action = means["made right"] / np.maximum(means["asked"], 1e-9)
        return {
            "recognised": float(means["made right"].sum()),
            "recognised_of_real": float(means["real right"].sum()),
            "actions": float((by_action > 0.5).sum()),
            "worst_action": float(by_action.min()),
            "distance": frechet(means, "made", "real") / frechet(means, "noise", "real"),
        }

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        made = model["generator"](batch.noise, batch.action)[: len(ACTIONS)]
        names = [ACTIONS[action] for action in batch.action[: len(ACTIONS)].tolist()]
        strips = [
            Artifact.image(_strips(clips), f"{what}, a clip in each row: {', '.join(names)}")
            for what, clips in {"made": made, "of the test": batch.real[: len(ACTIONS)]}.items()
        ]
        return [*strips, *(_gif(clip, name) for clip, name in zip(made, names, strict=True))]

    def generate(self, model: Any, count: int) -> list[dict[str, Any]]:
        actions = torch.arange(count) % len(ACTIONS)
        made = model["generator"](torch.randn(count, NOISE), actions)
        names = [ACTIONS[action] for action in actions.tolist()]
        return [{"action": name, "clip": _gif(clip, name)} for clip, name in zip(made, names, strict=True)]


def _classifier() -> VideoCnn:
    return VideoCnn(width=8, stages=3, faces=False)


def _strips(clips: torch.Tensor) -> Any:
    from jobs.common.pictures import tiles

    return tiles(clips.flatten(0, 1).float().cpu().numpy(), FRAMES, ZOOM // 2)


def _gif(clip: torch.Tensor, caption: str) -> Artifact:
    frames = (255 * clip.float()).round().to(torch.uint8).cpu().numpy()
    return Artifact.animation(frames.repeat(ZOOM, 1).repeat(ZOOM, 2), FPS, caption)


def make_data(url: str, train: int = 2400, test: int = 480, epochs: int = 6) -> dict[str, int]:
    """Writes clips under url/train and url/test, and a classifier of them; returns rows by split.

    Args:
        epochs: of the classifier, which learns from as many clips as video_cnn's, with their noise.
    """
    judge.save(url, judge.train(_classifier(), clip_splits(train, test)["train"], epochs))
    return write_splits(url, clip_splits(train, test, noise=0.0), rows_per_group=32)


if __name__ == "__main__":
    main(make_data)
