"""Paths of a spec as other processes find them, whatever directory they run in.

at_home(spec, "/home/me/digits").data.train      # "/home/me/digits/data/train", where it was "data/train"

Pure.
"""

from __future__ import annotations

import posixpath
from typing import Any

from dltrain.spec.job import JobSpec

__all__ = ["absolute", "at_home"]


def at_home(spec: JobSpec, cwd: str) -> JobSpec:
    """The same spec with its relative paths below `cwd` made absolute; URLs stay as they are."""
    raw = spec.to_dict()
    data: dict[str, Any] = raw["data"]
    for node, field in [(raw, "runs"), (data, "train"), (data, "eval"), *((mix, "url") for mix in data["mix"])]:
        if node[field] is not None:
            node[field] = absolute(node[field], cwd)
    return JobSpec.model_validate(raw)


def absolute(url: str, cwd: str) -> str:
    """A path below `cwd` as an absolute one."""
    return url if "://" in url or url.startswith("~") else posixpath.normpath(posixpath.join(cwd, url))
