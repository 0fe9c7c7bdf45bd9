"""The `dltrain` command: one verb per function; parse, call, print.

dltrain run jobs/image_cnn.yaml workers=2 optim.lr=3e-4
dltrain plan jobs/image_cnn.yaml --json
"""

from __future__ import annotations

import contextlib
import json as json_module
import os
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dltrain.cli_data import data_app
from dltrain.cli_deploy import k8s
from dltrain.cli_doctor import add_to as add_doctor
from dltrain.cli_jobs import add_to as add_jobs
from dltrain.cli_report import add_to as add_reports
from dltrain.cli_use import add_to as add_use
from dltrain.errors import DltrainError, TaskError

__all__ = ["main"]

_LAUNCHED = time.monotonic()

app = typer.Typer(
    name="dltrain",
    help="Train deep-learning models on a Ray cluster with DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.command()(k8s)

Spec = Annotated[str, typer.Argument(help="The job's YAML file.", metavar="SPEC")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that replace the file's, for example optim.lr=3e-4 workers=2.", metavar="KEY=VALUE"),
]
Run = Annotated[str, typer.Argument(help="A run's name (under ./runs or $DLTRAIN_RUNS) or its URL.", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Address = Annotated[
    str | None,
    typer.Option(help="A Ray cluster (host:6379 or auto); default: RAY_ADDRESS, else a private Ray."),
]


@app.command()
def run(spec: Spec, overrides: Overrides = None, address: Address = None, json: Json = False) -> None:
    """Train. The same command again resumes the same run from its last checkpoint."""
    from dltrain.observing.report import print_summary
    from dltrain.observing.view import make_view
    from dltrain.running.driver import Driver
    from dltrain.spec import load_spec

    driver = Driver(load_spec(spec, overrides or []), make_view(json), address, launched=_LAUNCHED)
    # Ray prints to stdout when a process of its dies; with --json that is not the place.
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        summary = driver.run()
    number = summary.pop("signal", None)
    if json:
        _print_json(summary)
    else:
        print_summary(summary, spec)
    if number:
        # The status that a job's retry resumes from.
        raise typer.Exit(128 + number)


@app.command()
def plan(spec: Spec, overrides: Overrides = None, json: Json = False) -> None:
    """Show what a run would do, without Ray: batch arithmetic, data per worker, memory, DeepSpeed's JSON."""
    from dltrain.running.dry import dry_run, print_plan
    from dltrain.spec import load_spec

    # What the task prints is not the answer.
    with contextlib.redirect_stdout(sys.stderr):
        found = dry_run(load_spec(spec, overrides or []))
    if json:
        _print_json(found)
    else:
        print_plan(found)


@app.command(name="list")
def list_(json: Json = False) -> None:
    """The runs under ./runs or $DLTRAIN_RUNS."""
    from dltrain.observing.report import print_runs
    from dltrain.running.rundir import find_run, list_runs, runs_url

    states = [{"run": name, **(find_run(name).state() or {"state": "planning"})} for name in list_runs()]
    if json:
        _print_json({"runs": states})
    else:
        print_runs(states, runs_url())


@app.command()
def drain(
    wait: Annotated[float, typer.Option(help="Seconds to wait until the work has moved away; 0: only ask.")] = 300.0,
    json: Json = False,
) -> None:
    """Move the work of this machine away: its workers finish their step, save, and go on elsewhere.

    For the preStop hook of a Kubernetes pod, or whatever hears that a spot machine will be taken. Exit 1 when the work
    was still here in the end.
    """
    from dltrain.running.control import drain_host

    done = drain_host(wait)
    if json:
        _print_json(done)
    elif not done["agents"]:
        typer.echo("no workers on this machine")
    else:
        typer.echo(f"{done['left']} of {done['agents']} workers have left this machine")
    if wait and done["still_here"]:
        raise typer.Exit(1)


@app.command()
def audit(run: Run, json: Json = False) -> None:
    """Prove that the checkpointed steps were trained on every row exactly once an epoch; exit 1 when they were not."""
    from dltrain.running.control import audit_run

    found = audit_run(run)
    if json:
        _print_json(found)
    else:
        for line in found["epochs"]:
            typer.echo(line["text"])
        typer.echo(f"checkpoint of step {found['step']}: {'good' if found['ok'] else 'NOT the rows it should be'}")
    if not found["ok"]:
        raise typer.Exit(1)


add_jobs(app)
add_use(app)
add_reports(app)
add_doctor(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: errors of ours become a message and their exit code, without a traceback."""
    try:
        _main(arguments)
    except SystemExit as end:
        cluster = sys.modules.get("dltrain.running.cluster")
        if cluster and cluster.head_is_gone:
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
    except BrokenPipeError:
        # `dltrain list | head`: nobody reads on. Not by SIGPIPE's default action, which would also end a run whose
        # metrics somebody stopped reading.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _main(arguments: Sequence[str] | None) -> None:
    json = "--json" in (arguments if arguments is not None else sys.argv)
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="dltrain")
    except DltrainError as error:
        _print_error(error, json)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        sys.stdout.flush()


def _print_error(error: DltrainError, json: bool) -> None:
    trace = error.trace if isinstance(error, TaskError) else ""
    # Of a run; what predicts has no ranks.
    known = isinstance(error, TaskError) and error.rank >= 0
    where = f" (rank {error.rank}, step {error.step})" if isinstance(error, TaskError) and known else ""
    if json:
        _print_json({"status": "failed", "error": f"{error}{where}", "trace": trace, "exit_code": error.exit_code})
    if trace:
        print(trace, file=sys.stderr)
    print(f"dltrain: {error}{where}", file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json_module.dumps(value))


if __name__ == "__main__":
    main()
