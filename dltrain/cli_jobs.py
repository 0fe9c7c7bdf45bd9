"""The commands that look after a run from outside: here by its directory, on a cluster by its Ray job.

dltrain submit jobs/image_cnn.yaml runs=s3://bucket/runs --address http://head:8265
dltrain status|logs|stop image-cnn [--address http://head:8265]; dltrain top image-cnn
"""

from __future__ import annotations

import dataclasses
import json as json_module
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dltrain.deploying.jobs import Job, Jobs
    from dltrain.deploying.packing import Package

__all__ = ["add_to"]

_CTRL_C_CODE = 130

Run = Annotated[str, typer.Argument(help="A run's name (under ./runs or $DLTRAIN_RUNS) or its URL.", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Head = Annotated[
    str, typer.Option(help="Ray's dashboard, http://HEAD:8265.", envvar="RAY_API_SERVER_ADDRESS", metavar="URL")
]
OfJob = Annotated[
    str | None, typer.Option(help="Of a submitted run: Ray's dashboard, http://HEAD:8265.", metavar="URL")
]


def add_to(app: typer.Typer) -> None:
    """Gives a command line these commands."""
    for command in (submit, jobs, status, logs, top, stop):
        app.command()(command)


def submit(
    spec: Annotated[str, typer.Argument(help="The job's YAML file.", metavar="SPEC")],
    address: Head,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the file's.", metavar="KEY=VALUE")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the job is submitted.")] = False,
    max_mb: Annotated[float, typer.Option(help="Most megabytes of the working directory.", min=0)] = 100,
    allow_local_runs: Annotated[
        bool, typer.Option("--allow-local-runs", help="`runs` is a directory that all nodes share.")
    ] = False,
    json: Json = False,
) -> None:
    """Train on a Ray cluster: send the working directory, start a job, follow it to its end.

    The job is `dltrain run SPEC` in a copy of this directory, without what .gitignore names. Its exit code becomes this
    command's. Ctrl-C asks whether to stop the job or to leave it running.

        dltrain submit digits.yaml runs=s3://bucket/runs workers=8 --address http://head:8265

    The same command again resumes the run. A token comes from RAY_AUTH_TOKEN; credentials for S3 are not sent, they are
    the cluster's own.
    """
    from dltrain.deploying.jobs import Jobs
    from dltrain.deploying.packing import Package
    from dltrain.deploying.submission import prepare
    from dltrain.spec import load_spec

    say = _teller(json)
    _quieten_ray()
    cwd = Path.cwd()
    loaded = load_spec(spec, overrides or [])
    package = Package.of(cwd, include=[Path(spec)])
    submission = prepare(
        loaded,
        Package.name_of(cwd, Path(spec)),
        overrides or [],
        package,
        allow_local_runs=allow_local_runs,
        python_path=os.environ.get("PYTHONPATH", ""),
    )
    package.check(max_mb * 10**6)
    for note in submission.notes:
        print(note, file=sys.stderr)
    cluster = Jobs(address)
    with tempfile.TemporaryDirectory(prefix="dltrain-submit-") as directory:
        archive = Path(directory, f"{loaded.name}.zip")
        say(_size_of(package, package.write(archive)))
        job = cluster.submit(submission, archive)
    say(f"submitted as job {job.id}, into {job.directory}")
    if detach:
        _left_running(cluster, job, json)
    else:
        _end_with(*_follow(cluster, job, json), cluster, json)


def jobs(address: Head, json: Json = False) -> None:
    """The runs that were submitted to a cluster, oldest first."""
    from dltrain.deploying.jobs import Jobs
    from dltrain.observing.report import print_jobs

    _quieten_ray()
    cluster, now = Jobs(address), time.time()
    found = [job.to_dict(now) for job in cluster.all()]
    if json:
        _print_json({"address": cluster.address, "jobs": found})
    else:
        print_jobs(found, cluster.address)


def status(run: Run, address: OfJob = None, json: Json = False) -> None:
    """What a run is doing now, and where its time went."""
    from dltrain.observing.report import print_status

    found = _job_status(run, address) if address else _run_status(run)
    if json:
        _print_json(found)
    else:
        print_status(found, found["told"])


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option(help="Only this rank's.", min=0)] = None,
    address: OfJob = None,
    json: Json = False,
) -> None:
    """What a run's workers have printed; of a submitted run, what its job has.

    dltrain logs image-cnn -f --rank 0
    """
    from dltrain.errors import UserError

    if address and rank is not None:
        raise UserError("--rank is for logs in a run's directory; a job's log has what the run and its rank 0 said")
    lines: list[Any] = []
    if address:
        _job_logs(run, address, follow, lines.append if json else typer.echo)
    else:
        _run_logs(run, follow, rank, lines.append if json else _printer(rank))
    if json:
        plain = [line if isinstance(line, str) else dataclasses.asdict(line) for line in lines]
        _print_json({"run": run, "lines": plain})


def top(
    run: Run,
    once: Annotated[bool, typer.Option("--once", help="One picture, then end.")] = False,
    json: Json = False,
) -> None:
    """Watch a live run: speed, phases of each rank, stragglers, checkpoint, where its time goes. q leaves."""
    from rich.console import Console

    from dltrain.observing.live import Live, watch
    from dltrain.running.rundir import find_run

    found = find_run(run)
    live = Live(found.store, found.state)
    if json:
        _print_json(live.facts())
        return
    console = Console()
    if once:
        console.print(live.frame(console.width)[1])
    else:
        watch(live, console)


def stop(
    run: Run,
    wait: Annotated[bool, typer.Option(help="Return when the run has stopped.")] = True,
    address: OfJob = None,
    json: Json = False,
) -> None:
    """Stop a run after the step it is in, with a checkpoint; `run` or `submit` goes on from there."""
    if address:
        job = _stop_job(run, address, wait)
        if json:
            _print_json(job.to_dict(time.time()))
        else:
            typer.echo(f"{job.run}: job {job.id} {'is' if job.is_over else 'was asked to stop, and is'} {job.status}")
        return
    from dltrain.running.control import stop_run

    state = stop_run(run, wait)
    if json:
        _print_json(state)
    else:
        typer.echo(f"{run}: {state['state']} at step {state.get('step', 0)}")


# ---- a run's directory ----


def _run_status(run: str) -> dict[str, Any]:
    """state.json, and what state and ledger say in words."""
    from dltrain.observing.journal import read_json
    from dltrain.observing.words import age_of_checkpoint, restarts_by_cause, time_shares, told
    from dltrain.running.rundir import find_run

    found, now = find_run(run), time.time()
    state, ledger = found.state() or {"run": run, "state": "planning"}, read_json(found.store, "ledger.json") or {}
    shares = time_shares(ledger.get("seconds", {}))
    return {
        **state,
        "time": [{"what": s.what, "seconds": round(s.seconds, 3), "percent": s.percent} for s in shares],
        "restarts_by_cause": restarts_by_cause(ledger.get("counters", {})),
        "checkpoint_age_seconds": age_of_checkpoint(state, now),
        "told": told(state, ledger, now),
    }


def _run_logs(run: str, follow: bool, rank: int | None, out: Callable[[Any], None]) -> None:
    from dltrain.observing.logs import follow_logs, read_logs
    from dltrain.observing.reports import OVER
    from dltrain.running.rundir import find_run

    found = find_run(run)
    if follow:
        follow_logs(found.store, rank, lambda: (found.state() or {}).get("state") in (*OVER, "lost"), out)
    else:
        for line in read_logs(found.store, rank):
            out(line)


def _printer(rank: int | None) -> Callable[[Any], None]:
    """Prints lines, with their rank where there may be several."""
    return lambda line: typer.echo(line.text if rank is not None else f"{line.rank} | {line.text}")


# ---- a job ----


def _job_status(run: str, address: str) -> dict[str, Any]:
    """The newest job of a run, and its directory's state where it can be read from here."""
    from dltrain.deploying.jobs import Jobs
    from dltrain.errors import StoreError, UserError

    _quieten_ray()
    job = Jobs(address).newest(run)
    known = job.to_dict(time.time())
    try:
        return {**known, **_run_status(job.directory)}
    except StoreError as error:
        told = [f"the run directory can't be read from here: {error}"]
    except UserError:
        told = ["the run directory is not there yet, or not on this machine"]
    return {**known, "state": job.status, "told": told}


def _job_logs(run: str, address: str, follow: bool, out: Callable[[str], None]) -> None:
    from dltrain.deploying.jobs import Jobs

    _quieten_ray()
    cluster = Jobs(address)
    job = cluster.newest(run)
    if follow:
        cluster.follow(job.id, out).run()
    else:
        for line in cluster.log(job.id).splitlines():
            out(line)


def _stop_job(run: str, address: str, wait: bool) -> Job:
    from dltrain.deploying.jobs import Jobs
    from dltrain.errors import UserError

    _quieten_ray()
    cluster = Jobs(address)
    job = cluster.newest(run)
    if job.is_over:
        raise UserError(f"{run} is not running: its last job, {job.id}, has {job.status}; there is nothing to stop")
    return cluster.stop(job, wait)


# ---- following a submitted job ----


def _follow(cluster: Jobs, job: Job, json: bool) -> tuple[Job, int]:
    """Shows a job's log until it is over, stopped or left alone; returns it and the exit code."""
    from dltrain.observing.view import Progress, make_view

    view = make_view(json)

    def show(line: str) -> None:
        progress = Progress.parse(line)
        if progress and sys.stdout.isatty():
            view.on_step(progress)
        else:
            view.log(line)

    follower = cluster.follow(job.id, show)
    while True:
        try:
            done = follower.run()
            view.close()
            return done, done.exit_code
        except KeyboardInterrupt:
            view.close()
            answer = _ask(json)
        if answer == "s":
            print("stopping after the step it is in, with a checkpoint", file=sys.stderr)
            cluster.stop(job, wait=False)
        elif answer == "d":
            return cluster.get(job.id), 0 if _can_ask(json) else _CTRL_C_CODE


def _can_ask(json: bool) -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and not json


def _ask(json: bool) -> str:
    """d, s or f; without somebody to ask, d."""
    if not _can_ask(json):
        return "d"
    try:
        return _first_of("dsf", input("\nthe job goes on. [d]etach, [s]top it, or [f]ollow on? "))
    except (KeyboardInterrupt, EOFError):
        return "d"


def _first_of(letters: str, answer: str) -> str:
    """What was answered by its first letter; anything else is `f`: nothing happens by mistake."""
    letter = answer.strip().lower()[:1]
    return letter if letter and letter in letters else "f"


def _end_with(job: Job, code: int, cluster: Jobs, json: bool) -> None:
    """Says how it ended, and ends so."""
    if not job.is_over:
        _left_running(cluster, job, json)
    elif json:
        _print_json({**job.to_dict(time.time()), "address": cluster.address, "summary": _summary(job)})
    else:
        typer.echo(f"job {job.id} has {job.status}, exit code {code}")
    if job.problem:
        print(f"dltrain: {job.problem}", file=sys.stderr)
    if code:
        raise typer.Exit(code)


def _summary(job: Job) -> Mapping[str, Any] | None:
    """What `dltrain run --json` would have printed, where the run's directory can be read from here."""
    from dltrain.errors import UserError
    from dltrain.running.rundir import find_run

    try:
        return (find_run(job.directory).state() or {}).get("summary")
    except UserError:
        return None


def _left_running(cluster: Jobs, job: Job, json: bool) -> None:
    """Says that a job goes on, and what can be done with it."""
    if json:
        _print_json({**job.to_dict(time.time()), "address": cluster.address, "summary": None})
        return
    typer.echo(f"job {job.id} goes on at {cluster.address}")
    for verb, what in {"logs": "follow it: add -f", "status": "how it is", "stop": "end it, with a checkpoint"}.items():
        typer.echo(f"  dltrain {verb} {job.run} --address {cluster.address}   {what}")


# ---- small things ----


def _size_of(package: Package, packed_bytes: int) -> str:
    from dltrain.wording import human_bytes

    files = f"{len(package.files):,} file{'s' if len(package.files) != 1 else ''}"
    return f"packed {package.root}: {files}, {human_bytes(package.num_bytes)}, {human_bytes(packed_bytes)} compressed"


def _teller(json: bool) -> Callable[[str], None]:
    """Says what happens; with --json on stderr."""
    return lambda text: print(text, file=sys.stderr if json else sys.stdout, flush=True)


def _quieten_ray() -> None:
    """Its client tells every upload and connection in a log of its own."""
    logging.disable(logging.INFO)


def _print_json(value: Any) -> None:
    print(json_module.dumps(value))
