"""The submission: what a job on a Ray cluster is made of, worked out from a spec and the package it travels in.

    submission = prepare(spec, "jobs/image_cnn.yaml", ["workers=4"], package)
    submission.entrypoint, submission.env_vars, submission.metadata

No credentials are among it: the cluster's own environment has those. Nothing is sent from here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dltrain.deploying.packing import Package, relative_python_path
from dltrain.errors import SpecError
from dltrain.spec import JobSpec

__all__ = ["RUN", "RUN_DIRECTORY", "Submission", "is_local", "prepare"]

# Keys of a job's metadata, by which it is found again.
RUN, RUN_DIRECTORY = "dltrain_run", "dltrain_dir"
# Ray kills a job that it has asked to stop after 3 seconds; a checkpoint may take longer to arrive in a slow store.
_STOP_SECONDS = 300
_LOCAL = ("file://", "local://")


@dataclass(frozen=True)
class Submission:
    """A job that may be submitted.

    Attributes:
        directory: URL of the run's directory.
        entrypoint: a shell's command line, run in the unpacked directory.
        notes: what the user should know.
    """

    run: str
    directory: str
    entrypoint: str
    env_vars: dict[str, str]
    notes: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster keeps beside the job."""
        return {RUN: self.run, RUN_DIRECTORY: self.directory}


def prepare(
    spec: JobSpec,
    spec_name: str,
    overrides: Sequence[str],
    package: Package,
    *,
    allow_local_runs: bool = False,
    python_path: str = "",
) -> Submission:
    """Makes a submission of a spec.

    Args:
        spec_name: the spec's file in the package; overrides: as they were given with it.
        allow_local_runs: `runs` is a directory that all nodes share.
        python_path: PYTHONPATH of this machine.

    Raises:
        SpecError: something of it would not be found on the cluster.
    """
    faults = [*_unpacked(spec, package), *(() if allow_local_runs else _local_runs(spec))]
    if faults:
        raise SpecError(spec_name, faults)
    runs, extra = spec.runs.rstrip("/"), []
    if is_local(spec.runs):
        # Relative to the unpacked directory it would be gone with the job.
        runs = str(package.root / _path(runs))
        extra = [f"runs={runs}"]
    python_path = relative_python_path(package.root, python_path)
    return Submission(
        run=spec.name,
        directory=f"{runs}/{spec.name}",
        # The shell gives way to it, so that it gets the signals itself.
        entrypoint=f"exec {shlex.join(['dltrain', 'run', spec_name, *overrides, *extra])}",
        env_vars={
            "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS),
            **({"PYTHONPATH": python_path} if python_path else {}),
        },
        notes=tuple(_notes(spec)),
    )


def is_local(url: str) -> bool:
    """Whether a URL names a place on a machine's own disk."""
    return "://" not in url or url.startswith(_LOCAL)


def _path(url: str) -> str:
    return next((url.removeprefix(scheme) for scheme in _LOCAL if url.startswith(scheme)), url)


def _local_runs(spec: JobSpec) -> Iterator[str]:
    if is_local(spec.runs):
        yield (
            f"runs: found {spec.runs!r}, a directory of one machine; each node writes its part of a checkpoint there, "
            "and a job that is submitted again reads them all: set runs=s3://bucket/runs. If all nodes share a file "
            "system at this path, add --allow-local-runs"
        )


def _unpacked(spec: JobSpec, package: Package) -> Iterator[str]:
    """What is here and would not be there."""
    module = spec.task.rpartition(":")[0]
    stem = module.replace(".", "/")
    names = [module] if module.endswith(".py") else [f"{stem}.py", f"{stem}/__init__.py"]
    here = [name for name in names if (package.root / name).is_file()]
    if here and not package.holds(here[0]):
        yield f"task: {here[0]} is not in the package; it must lie under {package.root}, and not in .gitignore"
    for field, url in _inputs(spec):
        path = _fixed_part(_path(url))
        if not is_local(url) or _is_absolute(path) or package.holds(path):
            continue
        if not (package.root / path).exists():
            yield f"{field}: there is no {url} under {package.root}; correct it, or make the data first"
        else:
            yield (
                f"{field}: {url} is not in the package (.gitignore?), so no node of the cluster has it; put the data "
                "into object storage, or give the absolute path of a file system that all nodes share"
            )


def _notes(spec: JobSpec) -> Iterator[str]:
    for field, url in _inputs(spec):
        if is_local(url) and _is_absolute(_path(url)):
            yield f"{field}: {url} is read from each node's own disk; it must be there on all of them"
    if is_local(spec.runs):
        yield f"runs: {spec.runs} must be the same directory on all nodes; this is not checked"


def _inputs(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Field and URL of all that is read."""
    if spec.data.train is not None:
        yield "data.train", spec.data.train
    for number, source in enumerate(spec.data.mix):
        yield f"data.mix.{number}.url", source.url
    if spec.data.eval is not None:
        yield "data.eval", spec.data.eval


def _is_absolute(path: str) -> bool:
    return Path(path).is_absolute() or path.startswith("~")


def _fixed_part(path: str) -> str:
    """A glob's directories before the first pattern."""
    parts = Path(path).parts
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return str(Path(*parts[:fixed]))
