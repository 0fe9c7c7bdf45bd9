"""The commands that use what was trained: predict, checkpoint list|verify|export|import, and new, which begins it all.

dltrain predict image-cnn scans/*.png --out drawn
dltrain checkpoint export image-cnn --format onnx
"""

from __future__ import annotations

import contextlib
import json as json_module
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from dltrain.using.bulk import BulkJob
    from dltrain.using.items import Item

__all__ = ["add_to"]

_BULK = "For a whole dataset (--to)"

Run = Annotated[str, typer.Argument(help="A run's name (under ./runs or $DLTRAIN_RUNS) or its URL.", metavar="RUN")]
Model = Annotated[str, typer.Argument(help="A run's name or URL, or that of an exported folder.", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Which = Annotated[str, typer.Option("--step", help="A step, `newest` or `best`.")]
Code = Annotated[
    str | None, typer.Option(help="Directory that the task is imported from; default: this one.", metavar="DIR")
]

checkpoint_app = typer.Typer(help="List, verify, export and import checkpoints.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Gives a command line these commands."""
    app.command()(predict)
    app.command()(new)
    app.add_typer(checkpoint_app, name="checkpoint")


def predict(
    run: Model,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, directories or globs, any fsspec URL; - for lines of stdin. Parquet, CSV and JSON lines give "
            "their rows.",
            metavar="INPUT",
        ),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to predict for; may be repeated.")] = None,
    count: Annotated[int | None, typer.Option(help="How many to make, of a task that needs no input.", min=1)] = None,
    step: Which = "best",
    out: Annotated[str | None, typer.Option(help="Where pictures, sound and other files go.", metavar="DIR")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a forward pass.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of what is random in the task.", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(help="Replaces one of the task's `args`; the network must stay the same.", metavar="KEY=VALUE"),
    ] = None,
    code: Code = None,
    to: Annotated[
        str | None,
        typer.Option(help="Writes the predictions of a Parquet INPUT there.", metavar="URL", rich_help_panel=_BULK),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Columns beside the prediction, id,label; or all, or none.", rich_help_panel=_BULK)
    ] = "all",
    column: Annotated[str, typer.Option(help="The prediction's name.", rich_help_panel=_BULK)] = "prediction",
    part_rows: Annotated[int, typer.Option(help="Most rows of a file of them.", min=1, rich_help_panel=_BULK)] = 32_768,
    bad_rows: Annotated[int, typer.Option(help="Rows that may be left without one.", min=0, rich_help_panel=_BULK)] = 0,
    workers: Annotated[
        int | None,
        typer.Option(help="Ray workers, a CPU or GPU each; default: this process.", min=1, rich_help_panel=_BULK),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Their Ray cluster, as for `dltrain run`.", rich_help_panel=_BULK)
    ] = None,
    json: Json = False,
) -> None:
    """Use a trained network.

    What a task makes of an input, and what it predicts, the task says (docs/predict.md):

        dltrain predict image-cnn scans/*.png --out drawn
        echo "how are you?" | dltrain predict translate -
        dltrain predict gan-image --count 16 --seed 3 --out made

    A whole dataset, here or on a cluster; the same command again goes on where it was interrupted:

        dltrain predict image-cnn s3://bucket/scans --to s3://bucket/labels --workers 8 --address auto

    Exit code 2 when one of the inputs could not be used.
    """
    from dltrain.errors import UserError
    from dltrain.using.bulk import BulkJob

    chosen: dict[str, Any] = {
        "device": device,
        "args": _args(arg or []),
        "code": os.path.abspath(code) if code else None,
    }
    if to is None:
        _check_bulk_only(workers=workers, address=address, keep=keep != "all", bad_rows=bad_rows)
        _predict_here(
            run, step, _asked(inputs or [], text or [], count), count, out, _size(inputs, batch), seed, chosen, json
        )
        return
    if len(inputs or []) != 1 or text or count or out:
        raise UserError("--to writes the predictions of one Parquet INPUT, a directory, glob or file; give that alone")
    job = BulkJob(
        run=run,
        step=0,
        source=(inputs or [""])[0],
        target=to,
        keep=_columns(keep),
        column=column,
        batch=batch,
        part_rows=part_rows,
        seed=seed,
        bad_rows=bad_rows,
        **chosen,
    )
    _predict_all(job, step, workers or (1 if address else None), address, json)


def _predict_here(
    run: str,
    step: str,
    items: Iterable[Item],
    count: int | None,
    out: str | None,
    batch: int,
    seed: int,
    chosen: Mapping[str, Any],
    json: bool,
) -> None:
    """Predicts for what was asked for, and shows it."""
    from dltrain.using.model import load
    from dltrain.using.results import Folder
    from dltrain.using.show import Shown

    stdout = sys.stdout
    # What the task prints is not the answer.
    with contextlib.redirect_stdout(sys.stderr):
        folder = Folder(out)
        told = Shown(load(run, step, **chosen), folder, None if json else _writer(stdout))
        if count:
            told.made(count, seed)
        else:
            told.items(items, batch, seed)
    if json:
        _print_json(told.summary())
    elif folder.left:
        print(f"{folder.left} file(s) were made and not kept; name a directory with --out", file=sys.stderr)
    if told.bad:
        raise typer.Exit(2)


def _predict_all(job: BulkJob, step: str, workers: int | None, address: str | None, json: bool) -> None:
    """Writes the predictions for a dataset."""
    from dltrain.data.progress import ProgressBar
    from dltrain.using.finding import find_trained
    from dltrain.using.spread import predict_all

    # So that workers are told to go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    trained = find_trained(job.run, step)
    job = replace(job, run=trained.url, step=trained.step)
    with contextlib.redirect_stdout(sys.stderr), ProgressBar("predicting", "rows") as bar:
        done = predict_all(job, workers=workers, address=address, progress=bar.update, say=_say)
    if json:
        _print_json(done)
        return
    bad = f", {len(done['bad_rows']):,} without a prediction" if done["bad_rows"] else ""
    typer.echo(
        f"wrote the predictions for {done['rows']:,} rows{bad} to {done['target']} in {done['files']:,} files: "
        f"{done['rows_per_second']:,.0f} rows/s, {done['workers']} worker(s)"
    )


def new(
    name: Annotated[str, typer.Argument(help="A word: letters, digits and _; NAME.py and others are written.")],
    json: Json = False,
) -> None:
    """Begin: a task, its YAML and a test, which train on data that the task makes itself. Nothing is written over.

    dltrain new digits
    """
    from dltrain.using.starter import write_starter

    done = write_starter(name)
    if json:
        _print_json(done)
        return
    typer.echo(f"wrote {', '.join(done['files'])}")
    for command, what in done["next"].items():
        typer.echo(f"  {command}   # {what}")


# ---- checkpoints ----


@checkpoint_app.command(name="list")
def checkpoint_list(run: Run, json: Json = False) -> None:
    """The checkpoints of a run, oldest first."""
    from dltrain.observing.report import print_checkpoints
    from dltrain.running.control import checkpoint_table

    rows = checkpoint_table(run)
    if json:
        _print_json({"checkpoints": rows})
    else:
        print_checkpoints(rows)


@checkpoint_app.command()
def verify(run: Run, json: Json = False) -> None:
    """Read every checkpoint back and compare sizes and checksums; exit 1 when one is damaged."""
    from dltrain.running.control import verify_checkpoints

    rows = verify_checkpoints(run)
    if json:
        _print_json({"checkpoints": rows})
    else:
        for row in rows:
            typer.echo(f"step {row['step']}: {'; '.join(row['problems']) or 'good'}")
    if any(row["problems"] for row in rows):
        raise typer.Exit(1)


@checkpoint_app.command()
def export(
    run: Model,
    to: Annotated[
        str | None,
        typer.Option(
            help="A file with the format's suffix, else a folder; a path or URL.", show_default="RUN-exported"
        ),
    ] = None,
    step: Which = "best",
    format: Annotated[str, typer.Option(help="safetensors, torchscript, pt2 (torch.export) or onnx.")] = "safetensors",
    network: Annotated[str, typer.Option(help="Of several networks, whose graph.", show_default=False)] = "",
    code: Code = None,
    json: Json = False,
) -> None:
    """Take a trained network away, for other programs or for `dltrain predict` elsewhere.

    safetensors: the weights as one file that load_state_dict takes, and beside it config.json and the task's file, so
    that `dltrain predict FOLDER` and `dltrain.load` need nothing else. The others are graphs that run without the
    task's code; each is compared with the network before it is written.

        dltrain checkpoint export image-cnn --to taken
        dltrain checkpoint export image-cnn --to model.onnx --format onnx
    """
    from dltrain.using.exporting import export as export_model

    with contextlib.redirect_stdout(sys.stderr):
        done = export_model(run, to or f"{os.path.basename(run.rstrip('/'))}-exported", step, format, network, code)
    if json:
        _print_json(done)
        return
    typer.echo(f"wrote step {done['step']} to {done['file']} ({done['bytes']:,} bytes)")
    if "difference" in done:
        shapes = ", ".join(f"{one['dtype']} {one['shape']}" for one in done["inputs"])
        typer.echo(f"it takes {shapes}; outputs by {done['compared_with']} differ by {done['difference']:.2g} at most")
        for note in done["notes"]:
            print(note, file=sys.stderr)


@checkpoint_app.command(name="import")
def import_(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folder of engine.save_checkpoint; of a task of several networks NAME=FOLDER for each.",
            metavar="FOLDER",
        ),
    ],
    to: Annotated[
        str | None, typer.Option(help="Writes the weights into this folder, as export does.", metavar="DIR")
    ] = None,
    spec: Annotated[
        str | None, typer.Option(help="With --to: the YAML that says their task and args.", metavar="SPEC")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(help="Begins the run of this YAML with weights and optimizer state.", metavar="SPEC"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Replaces one of the spec's settings.", metavar="KEY=VALUE")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Read files that name other code than DeepSpeed's; it is run.")
    ] = False,
    json: Json = False,
) -> None:
    """Take over what DeepSpeed trained without dltrain, from any ZeRO stage and number of workers.

    As the first checkpoint of a run, which goes on at that step with any number of workers, or as weights in a folder:

        dltrain checkpoint import old/out --run job.yaml && dltrain run job.yaml
        dltrain checkpoint import old/out --to taken --spec job.yaml
    """
    from dltrain.errors import UserError
    from dltrain.spec import load_spec
    from dltrain.using.importing import to_folder, to_run

    if (to is None) == (run is None):
        raise UserError("give --run SPEC to go on training, or --to DIR for the weights alone")
    named = _named(sources)
    loaded = load_spec(run or spec or "", set_ or []) if run or spec else None
    with contextlib.redirect_stdout(sys.stderr):
        if to is not None:
            done = to_folder(named, to, loaded, trust)
        else:
            assert loaded is not None
            done = to_run(named, loaded, trust)
    if json:
        _print_json(done)
        return
    for one in done["sources"]:
        note = f"; without the optimizer's state: {one['note']}" if one["note"] and to is None else ""
        typer.echo(f"{one['path']}: ZeRO {one['zero']}, {one['num_ranks']} worker(s){note}")
    typer.echo(f"wrote step {done['step']} to {done['file'] if to else done['run']}")


# ---- small things ----


def _asked(inputs: Sequence[str], text: Sequence[str], count: int | None) -> Iterable[Item]:
    """What is to be predicted for, one after the other."""
    from dltrain.data.raw import Input
    from dltrain.errors import UserError
    from dltrain.using.items import given

    if count and (inputs or text):
        raise UserError("--count makes things out of nothing; leave it out to predict for inputs")
    if not (inputs or text or count):
        raise UserError(
            "nothing to predict for: name files, - for lines of stdin, --text, or --count for a task that needs none"
        )
    texts = (Input(f"text {number}", text=one) for number, one in enumerate(text))
    return chain(texts, chain.from_iterable(map(given, inputs)))


def _size(inputs: Sequence[str] | None, batch: int) -> int:
    """Rows of a batch: whoever types wants each line answered."""
    return 1 if "-" in (inputs or []) and sys.stdin.isatty() else batch


def _columns(keep: str) -> tuple[str, ...] | None:
    """--keep; None: all."""
    return {"all": None, "none": ()}.get(keep, tuple(name.strip() for name in keep.split(",")))


def _args(given: Sequence[str]) -> dict[str, Any]:
    """--arg KEY=VALUE, the values read as YAML."""
    import yaml

    from dltrain.errors import UserError

    found = {}
    for one in given:
        name, equals, text = one.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--arg {one}: write KEY=VALUE, for example --arg temperature=0.7")
        found[name] = yaml.safe_load(text)
    return found


def _named(sources: Sequence[str]) -> dict[str, str]:
    """FOLDER, or NAME=FOLDER ..., by the network's name."""
    pairs = (source.partition("=") for source in sources)
    named = {name: path for name, equals, path in pairs if equals and name.isidentifier()}
    return named if len(named) == len(sources) else {"": sources[0]} if len(sources) == 1 else _refuse_names()


def _refuse_names() -> dict[str, str]:
    from dltrain.errors import UserError

    raise UserError("several folders are of several networks: write NAME=FOLDER for each, with the task's names")


def _check_bulk_only(**given: Any) -> None:
    from dltrain.errors import UserError

    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if names:
        raise UserError(f"{', '.join(names)} is for a whole dataset; name with --to where its predictions are written")


def _writer(stream: TextIO) -> Callable[[str], None]:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json_module.dumps(value))
