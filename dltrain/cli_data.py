"""The `dltrain data` commands: what a dataset holds, and writing it anew.

dltrain data inspect s3://bucket/digits
dltrain data rewrite s3://bucket/digits s3://bucket/digits-32 --row-group-mb 32
"""

from __future__ import annotations

import contextlib
import json as json_module
import signal
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

__all__ = ["data_app"]

_SLOW_SECONDS = 2.0
_LARGEST_COLUMNS = 40

data_app = typer.Typer(
    help="Look into a Parquet dataset, and write it anew in a better shape.",
    no_args_is_help=True,
)
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]


@data_app.command()
def inspect(
    url: Annotated[str, typer.Argument(help="Directory, glob or file of Parquet; any fsspec URL.", metavar="URL")],
    global_batch: Annotated[int, typer.Option(help="Rows of a step, for the order and the memory.")] = 256,
    workers: Annotated[int, typer.Option(help="Workers, for the memory of each.")] = 8,
    json: Json = False,
) -> None:
    """Show what a dataset holds, how it would be shuffled, and what to fix, each with the command that does it.

    Only footers and a few rows are read. For example:

        dltrain data inspect s3://bucket/digits --workers 16
    """
    from dltrain.data.inspect import inspect_data
    from dltrain.data.progress import ProgressBar

    with ProgressBar("footers", "files", patience=_SLOW_SECONDS) as bar:
        found = inspect_data(url, global_batch=global_batch, workers=workers, progress=bar.update)
    if json:
        print(json_module.dumps(found))
    else:
        _print_inspection(found)


@data_app.command()
def rewrite(
    source: Annotated[str, typer.Argument(help="Directory, glob or file of Parquet; any fsspec URL.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="A directory that is empty or not there yet.", metavar="DST")],
    row_group_mb: Annotated[float, typer.Option(help="MiB of a row group in memory.")] = 32,
    file_mb: Annotated[float, typer.Option(help="MiB at which a file is full.")] = 512,
    columns: Annotated[str, typer.Option(help="Only these, for example image,label.", show_default="all")] = "",
    compression: Annotated[str, typer.Option(help="zstd, snappy, lz4, gzip, brotli or none.")] = "zstd",
    fix_lists: Annotated[
        bool, typer.Option("--fix-lists", help="Lists of numbers of one length become fixed-size lists.")
    ] = False,
    pack_lists: Annotated[
        bool,
        typer.Option("--pack-lists", help="They become bytes of a fixed size: several times as fast to decode."),
    ] = False,
    json: Json = False,
) -> None:
    """Write a dataset anew with row groups of a good size; rows, order and schema stay as they are.

    It streams: memory holds a few of the new row groups, however large the
    old ones are. For example:

        dltrain data rewrite s3://bucket/raw s3://bucket/raw-32

    DST appears wholly or not at all. On a disk it is a hidden directory until
    it is renamed. In object storage no file is listed until all have arrived;
    then they are completed one after the other, and until the last is, DST
    holds a mark (_dltrain-unfinished) for which dltrain refuses to read the
    directory. Other programs may see the first files in those seconds.

    An interrupted rewrite leaves nothing to see; the same command again
    clears up what it left, and starts over.
    """
    from dltrain.data.progress import ProgressBar
    from dltrain.data.rewrite import rewrite as rewrite_data
    from dltrain.errors import UserError

    if fix_lists and pack_lists:
        raise UserError("--fix-lists and --pack-lists both say what becomes of lists; give one of them")
    # So that what was begun is cleared up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = [name.strip() for name in columns.split(",")] if columns else None
    with ProgressBar("rewriting") as bar:
        done = rewrite_data(
            source,
            target,
            row_group_mb=row_group_mb,
            file_mb=file_mb,
            columns=names,
            compression=compression,
            lists="packed" if pack_lists else "fixed" if fix_lists else "keep",
            progress=bar.update,
        )
    if json:
        print(json_module.dumps(done))
    else:
        _print_rewritten(done)


@data_app.command()
def check(
    url: Annotated[str, typer.Argument(help="Directory, glob or file of Parquet; any fsspec URL.", metavar="URL")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="A dataset that must have no rows of it, such as the test data; repeatable."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column with the classes.", show_default="label, target, ...")
    ] = None,
    ignore: Annotated[
        str, typer.Option(help="Columns that say nothing of a row's contents.", show_default="id, path, ...")
    ] = "",
    run: Annotated[str | None, typer.Option(help="A trained run: labels that it contradicts are told.")] = None,
    prediction: Annotated[
        str | None, typer.Option(help="Column that `dltrain predict --to` wrote.", show_default="found by its type")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with 1 when there are faults.")] = False,
    json: Json = False,
) -> None:
    """Read all of a dataset and tell what is wrong with its contents: nulls, constant columns, values that are not
    numbers, rows that are there twice, the same row with different labels, rare classes, rows of the test data.

        dltrain data check data/train --against data/test

    With --run, or on what `dltrain predict RUN URL --to DIR` wrote, also the labels that a network contradicts: of
    each prediction it needs the label's name and `probability`. Examples are files and rows in them; --json lists more.
    """
    from tempfile import TemporaryDirectory

    from dltrain.data.progress import ProgressBar
    from dltrain.data.quality import check_data
    from dltrain.errors import UserError

    if run and prediction:
        raise UserError("--run makes the predictions, --prediction names some that are there; give one of them")
    # So that the predictions are cleared up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = [name.strip() for name in ignore.split(",") if name.strip()]
    with TemporaryDirectory(prefix="dltrain-check-") as made:
        checked = _predicted(run, url, made) if run else url
        with ProgressBar("checking", "rows", patience=_SLOW_SECONDS) as bar:
            found = check_data(
                checked,
                source=url if run else None,
                against=against or (),
                label=label,
                ignore=names,
                prediction=prediction or ("prediction" if run else None),
                progress=bar.update,
            )
    if json:
        print(json_module.dumps(found))
    else:
        _print_check(found)
    sys.exit(int(strict and any(one["kind"] == "fault" for one in found["findings"])))


def _predicted(run: str, url: str, directory: str) -> str:
    """Where the dataset is with a run's predictions beside its columns."""
    from dltrain.data.progress import ProgressBar
    from dltrain.using.bulk import BulkJob
    from dltrain.using.finding import find_trained
    from dltrain.using.spread import predict_all

    trained = find_trained(run, "best")
    job = BulkJob(run=trained.url, step=trained.step, source=url, target=f"{directory}/predicted")
    # What a task prints is not the answer.
    with contextlib.redirect_stdout(sys.stderr), ProgressBar("predicting", "rows") as bar:
        predict_all(job, progress=bar.update)
    return job.target


# ---- for people ----


def _print_rewritten(done: Mapping[str, Any]) -> None:
    from dltrain.data.progress import human_bytes, human_seconds

    for name, length in done["lists"].items():
        typer.echo(f"column {name!r}: lists of {length:,} numbers have a fixed size now")
    changes = (f"{what} {done[key]['before']:,} -> {done[key]['after']:,}" for key, what in _COUNTS.items())
    sizes = f"{human_bytes(done['bytes']['before'])} -> {human_bytes(done['bytes']['after'])}"
    took = f"{human_seconds(done['seconds'])}"
    typer.echo(f"wrote {done['rows']:,} rows to {done['target']}: {', '.join(changes)}, {sizes}, in {took}")


_COUNTS = {"files": "files", "row_groups": "row groups"}


def _print_inspection(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    from dltrain.data.progress import human_bytes

    console = Console(highlight=False)
    files, groups = found["files"], found["row_groups"]
    console.print(
        f"{escape(found['url'])}: {found['rows']:,} rows in {groups['count']:,} row groups in {files['count']:,} "
        f"files, {human_bytes(files['bytes']['total'])}"
    )
    if found["partitions"]:
        parts = ", ".join(f"{key} ({count:,} values)" for key, count in found["partitions"].items())
        console.print(f"directories named key=value: {escape(parts)}")
    console.print(_column_table(found["columns"]))
    if len(found["columns"]) > _LARGEST_COLUMNS:
        console.print(f"and {len(found['columns']) - _LARGEST_COLUMNS:,} smaller columns; --json lists all of them")
    console.print(_size_table(found))
    _print_order(console, found["order"])
    _print_advice(console, found["advice"])


def _column_table(columns: list[Mapping[str, Any]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from dltrain.data.progress import human_bytes

    table = Table("column", "type", "holds", "missing", "bytes", "uncompressed", "compression")
    kept = sorted(columns, key=lambda column: -column["compressed_bytes"])[:_LARGEST_COLUMNS]
    for column in (column for column in columns if column in kept):
        length = f", {column['list_length']:,} each" if column["list_length"] else ""
        table.add_row(
            escape(column["name"]),
            escape(column["type"]),
            escape(column["holds"] + length),
            "unknown" if column["nulls"] is None else f"{column['nulls']:,}",
            human_bytes(column["compressed_bytes"]),
            human_bytes(column["encoded_bytes"]),
            ", ".join(column["compression"]),
        )
    return table


def _size_table(found: Mapping[str, Any]) -> Any:
    from rich.table import Table

    from dltrain.data.progress import human_bytes

    table = Table("", "smallest", "median", "largest")
    groups = found["row_groups"]
    lines: tuple[tuple[str, Mapping[str, int], Any], ...] = (
        ("rows of a row group", groups["rows"], "{:,}".format),
        ("row group on the wire", groups["compressed_bytes"], human_bytes),
        ("row group in memory", groups["decoded_bytes"], human_bytes),
        ("file", found["files"]["bytes"], human_bytes),
    )
    for name, sizes, shown in lines:
        table.add_row(name, *(shown(sizes[key]) for key in ("min", "median", "max")))
    return table


def _print_order(console: Any, order: Mapping[str, Any]) -> None:
    from dltrain.data.progress import human_bytes

    if order:
        console.print(
            f"for batches of {order['global_batch']:,} rows on {order['workers']:,} workers: {order['lanes']:,} lanes "
            f"with windows of {order['window']:,} row groups; about "
            f"{human_bytes(order['memory_bytes_per_worker'])} of memory per worker; the mean of a batch varies "
            f"{order['vif']:.2f} times as much as in a full shuffle at worst; each row group is read up to "
            f"{order['read_amplification']:.2f} times an epoch"
        )


def _print_advice(console: Any, advice: list[Mapping[str, str]]) -> None:
    from rich.markup import escape

    console.print("\n[bold]what to fix[/bold]" if advice else "\nnothing to fix")
    for number, item in enumerate(advice, 1):
        console.print(f"{number}. {escape(item['problem'])}: {escape(item['why'])}")
        # A command is copied, so it is not broken into lines.
        console.print(f"   {escape(item['fix'])}", soft_wrap=True)


def _print_check(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    rows = found["rows"]
    console.print(f"[bold]{escape(found['url'])}[/bold]: {rows:,} rows; contents: {', '.join(found['inputs'])}")
    console.print(_value_table(found["columns"]))
    if found["label"]:
        classes = found["label"]["classes"]
        shown = ", ".join(f"{name} {count:,}" for name, count in list(classes.items())[:12])
        console.print(f"{found['label']['column']}: {len(classes)} classes: {escape(shown)}", highlight=False)
    console.print("\n[bold]what was found[/bold]" if found["findings"] else "\nnothing wrong was found")
    for number, item in enumerate(found["findings"], 1):
        color = "red" if item["kind"] == "fault" else "yellow"
        console.print(f"{number}. [{color}]{item['kind']}[/{color}] {escape(item['problem'])}")
        console.print(f"   {escape(item['why'])}; {escape(item['fix'])}", highlight=False)


def _value_table(columns: list[Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("column", "type", "nulls", "not finite", "empty", "different", "from", "to")
    for column in columns[:_LARGEST_COLUMNS]:
        different = "1" if column["constant"] else "" if column["distinct"] is None else f"{column['distinct']:,}"
        ends = ("" if column[end] is None else f"{column[end]:,.6g}" for end in ("min", "max"))
        counts = (f"{column[what]:,}" if column[what] else "" for what in ("nulls", "not_finite", "empty"))
        table.add_row(column["name"], column["type"], *counts, different, *ends)
    return table
