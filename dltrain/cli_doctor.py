"""`dltrain doctor`: what this machine, a cluster, the storage or a spec lacks for a run, and what to do.

dltrain doctor
dltrain doctor jobs/image_cnn.yaml runs=s3://bucket/runs --address auto
"""

from __future__ import annotations

import json as json_module
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Gives a command line this command."""
    app.command()(doctor)


def doctor(
    spec: Annotated[
        str | None, typer.Argument(help="A job's YAML file: its task, data and run directory too.", metavar="SPEC")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the file's.", metavar="KEY=VALUE")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster, to look at all of its nodes; default: RAY_ADDRESS, else a private Ray."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one check may take.", min=1)] = 60,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
) -> None:
    """Look for what would be in the way of a run, and say what to do about it.

    Looks at Python, torch, DeepSpeed and its CPU op, limits, memory, disks,
    GPUs, Ray, and adds up numbers over several processes as workers do. With
    --address on every node of the cluster, which must have the same versions
    and the same time, and reach each other. With a SPEC also: whether its
    task can be built, its data read, its run directory written, and whether
    its workers have room. For example:

        dltrain doctor

        dltrain doctor digits.yaml runs=s3://bucket/runs --address auto

    Nothing is changed; files that it writes into the run directory it
    removes. Exit code 0 when nothing failed, 1 when something did, 2 when
    the spec is wrong.
    """
    from dltrain.doctor.examination import Examination
    from dltrain.doctor.show import LiveProgress, print_report
    from dltrain.spec import load_spec

    loaded = load_spec(spec, overrides or []) if spec else None
    where = address or os.environ.get("RAY_ADDRESS") or ""
    with LiveProgress() as progress:
        report = Examination(loaded, "" if where == "local" else where, str(Path.cwd()), timeout).run(progress)
    if json:
        print(json_module.dumps(report.to_dict()))
    else:
        print_report(report)
    if report.left:
        # A thread that waits for a store would hold the interpreter's end up.
        sys.stdout.flush()
        os._exit(0 if report.good else 1)
    if not report.good:
        raise typer.Exit(1)
