"""What the jobs reach: `make bench-jobs`, or `make bench-jobs JOB=speech_rnn`.

python tests/bench/train_jobs.py [JOB ...] [--work DIR] [--results DIR] [--json]

Makes the data of each job where it is not there, runs jobs/JOB.yaml on this machine, and compares the job's own
evaluation with its goals and with baselines that are computed on the same data. `minutes` is what all runs of a job
took, launches included. Ends with 1 where a goal was missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE.parent), str(ROOT)]

import yaml  # noqa: E402
from machine import versions  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from jobs.common.figures import Figure, reached  # noqa: E402

DLTRAIN = str(Path(sys.executable).with_name("dltrain"))
# A job must be through in ten minutes on 2 cores.
MINUTES = 10.0


class JobFailedError(Exception):
    """A command of a job that did not end well."""


@dataclass
class JobBench:
    """Runs of one job, in a directory of their own."""

    job: str
    work: Path
    seconds: float = 0.0
    rate: float = 0.0

    @property
    def data(self) -> str:
        train = yaml.safe_load((ROOT / "jobs" / f"{self.job}.yaml").read_text())["data"]["train"]
        # Below it each job has what splits it likes.
        return str(ROOT.joinpath(*Path(train).parts[:2]))

    def make_data(self) -> None:
        if not any(Path(self.data).glob("*/*.parquet")):
            _call([sys.executable, "-m", f"jobs.{self.job}", "make-data", self.data])

    def run(self, *overrides: str, name: str = "", spec: str = "") -> Mapping[str, Any]:
        path = f"jobs/{spec or self.job}.yaml"
        more = [f"name={name}"] if name else []
        begin = time.perf_counter()
        found = self.command("run", path, f"runs={self.work}", *more, *overrides, "metrics.port=0")
        self.seconds += time.perf_counter() - begin
        # Of the last run, where there are several.
        self.rate = float(found["samples_per_second"])
        return found

    def command(self, *arguments: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads(_call([DLTRAIN, *arguments, "--json"]).strip().splitlines()[-1])
        return found


def _call(command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # How far it is, and what is wrong, is for everyone to see.
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise JobFailedError(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def measure(job: str, work: Path) -> list[dict[str, Any]]:
    """One row for each figure of a job; none of one that says it has none, which is not run."""
    module = importlib.import_module(f"jobs.{job}")
    if not hasattr(module, "figures") and not module.GOALS:
        print(f"{job} has no figures: what it reaches depends on what it is given", file=sys.stderr)
        return []
    bench = JobBench(job, work / job)
    bench.make_data()
    if hasattr(module, "figures"):
        found: list[Figure] = list(module.figures(bench))
    else:
        summary = bench.run()
        found = reached(module.GOALS, summary, module.baselines(bench.data) if hasattr(module, "baselines") else {})
    minutes = round(bench.seconds / 60, 2)
    return [
        {
            "job": job,
            **{key: value for key, value in asdict(figure).items() if key != "at_least"},
            "better": "more" if figure.at_least else "less",
            "met": figure.met and minutes <= MINUTES,
            "minutes": minutes,
            "samples_per_second": bench.rate,
        }
        for figure in found
    ]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("job", "figure", "value", "target", "baseline", "minutes", "samples/s", "")
    for row in rows:
        sign = ">=" if row["better"] == "more" else "<="
        baseline = "" if row["baseline"] is None else f"{row['baseline']:.4g}"
        table.add_row(
            row["job"],
            row["figure"],
            f"{row['value']:.4g}",
            f"{sign} {row['target']:.4g}",
            baseline,
            f"{row['minutes']:.1f}",
            f"{row['samples_per_second']:,.0f}",
            "met" if row["met"] else "[red]missed[/red]",
        )
    Console(stderr=True, width=140).print(table)


def known_jobs() -> list[str]:
    return sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.with_suffix(".yaml").exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"{', '.join(known_jobs())}; all of them by default")
    parser.add_argument("--work", default=str(ROOT / "build" / "bench-jobs"), help="where the runs go")
    parser.add_argument("--results", help="directory for jobs.json; rows of jobs that were not run stay in it")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    unknown = sorted(set(options.jobs) - set(known_jobs()))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known_jobs())}")
    work = Path(options.work) / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    rows: list[dict[str, Any]] = []
    failed = False
    for job in options.jobs or known_jobs():
        print(f"{job} ...", file=sys.stderr, flush=True)
        try:
            rows += measure(job, work)
        except JobFailedError as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        if options.results:
            # An hour's work is not to be lost by what comes after.
            _keep(Path(options.results) / "jobs.json", {**versions(), "rows": rows})
    show(rows)
    result = {**versions(), "rows": rows}
    print(", ".join(f"{key} {value}" for key, value in result.items() if key != "rows"), file=sys.stderr)
    if options.json:
        print(json.dumps(result))
    sys.exit(failed or not all(row["met"] for row in rows))


def _keep(path: Path, result: dict[str, Any]) -> None:
    """With the rows of other jobs that were measured before: each row has its day and its processor."""
    before = json.loads(path.read_text()) if path.exists() else {"rows": []}
    ran = {row["job"] for row in result["rows"]}
    kept = [{"cpu": before["cpu"], **row} for row in before["rows"] if row["job"] not in ran]
    new = [{**row, "date": result["date"], "cpu": result["cpu"]} for row in result["rows"]]
    rows = sorted(kept + new, key=lambda row: row["job"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
