"""The networks of `networks` as tasks, for what takes a spec."""

from __future__ import annotations

import networks
from torch import nn

from dltrain import Task


class Dense(Task):
    def build(self) -> nn.Module:
        return networks.dense(7)


class Tied(Task):
    def build(self) -> nn.Module:
        return networks.Tied(7)


class Normed(Task):
    """Has buffers."""

    def build(self) -> nn.Module:
        return normed(7)


class Two(Task):
    """A task of two networks, each of which was an engine of its own."""

    def build(self) -> dict[str, nn.Module]:  # type: ignore[override]
        return {"one": networks.dense(7), "other": networks.Tied(7)}


def normed(seed: int) -> nn.Module:
    return nn.Sequential(networks.dense(seed), nn.BatchNorm1d(networks.CLASSES))
