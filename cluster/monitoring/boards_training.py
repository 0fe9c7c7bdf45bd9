"""The dashboards of training itself: Overview, Learning, Time, Ranks.

overview(links).json()

Thresholds are those of rules.yml, where the recorded series are defined as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.monitoring.panels import (
    Ask,
    Board,
    Steps,
    bars,
    cells,
    figure,
    lines,
    query_variable,
    sheet,
    spread,
)

__all__ = ["RUN", "WELL_BELOW", "learning", "marked", "overview", "ranks", "run_variable", "time"]

RUN = 'run=~"$run"'
_RANK = f'{RUN}, rank=~"$rank"'
_RATE = "[$__rate_interval]"

GOODPUT: Steps = ((None, "red"), (0.8, "orange"), (0.9, "green"))
WELL_BELOW: Steps = ((None, "green"), (0.05, "orange"), (0.1, "red"))
_MFU: Steps = ((None, "red"), (0.2, "orange"), (0.35, "green"))
_SINCE_STEP: Steps = ((None, "green"), (120, "orange"), (600, "red"))
_AGE: Steps = ((None, "green"), (3600, "orange"), (7200, "red"))
_RESTARTS: Steps = ((None, "green"), (1, "orange"), (4, "red"))
_ANY: Steps = ((None, "green"), (1, "red"))
_STRAGGLER: Steps = ((None, "green"), (1.15, "orange"), (1.3, "red"))


def run_variable() -> Any:
    """Which runs are shown."""
    return query_variable("run", "Run", "label_values(dltrain_run_info, run)")


def _rank_variable() -> Any:
    return query_variable("rank", "Rank", f"label_values(dltrain_rank_steps_total{{{RUN}}}, rank)")


def marked(board: Board) -> Board:
    """Marks restarts, alerts and checkpoints in every panel."""
    restarts = f"sum by (run, reason) (increase(dltrain_restarts_total{{{RUN}}}{_RATE})) > 0"
    board.mark("Restarts", restarts, "red", "restart: {{reason}}", "{{run}}")
    alerts = f'ALERTS{{alertname=~"Dltrain.+", alertstate="firing", {RUN}}}'
    board.mark("Alerts", alerts, "orange", "{{alertname}}", "{{run}} {{rank}}")
    saved = f"sum by (run) (changes(dltrain_checkpoint_last_success_timestamp_seconds{{{RUN}}}{_RATE})) > 0"
    board.mark("Checkpoints", saved, "blue", "checkpoint", "{{run}}")
    return board


def overview(links: Sequence[Any]) -> Board:
    """Is it well, how fast is it, and what does it cost?"""
    text = "Is the run well, how fast is it, and where does its time go? Every figure leads to the dashboard behind it."
    board = marked(Board("dltrain-overview", "dltrain / Overview", text, [run_variable()], links))
    board.row("How fast", 4, _speed())
    board.row("How well", 4, _health())
    throughput = lines(
        "Throughput",
        "Rows trained on per second of the clock, whatever the time was spent on.",
        "rowsps",
        Ask(f"sum by (run) (rate(dltrain_samples_total{{{RUN}}}{_RATE}))"),
    )
    board.row("Course", 8, [throughput, loss_panel(), state_panel()])
    board.row("Runs", 6, [_runs()])
    return board


def _speed() -> list[Any]:
    return [
        figure(
            "Samples per second",
            "Rows trained on per second of the clock.",
            "rowsps",
            Ask(f"sum by (run) (rate(dltrain_samples_total{{{RUN}}}{_RATE}))"),
            to="dltrain-time",
        ),
        figure(
            "Tokens per second",
            "Units that losses are means over: tokens where the task counts them, else rows.",
            "cps",
            Ask(f"sum by (run) (rate(dltrain_tokens_total{{{RUN}}}{_RATE}))"),
            to="dltrain-time",
        ),
        figure(
            "MFU",
            "Model FLOPs (forward and backward, recomputation left out) per second, over the dense peak of all "
            "devices; the mean of 5 minutes. No value where the peak of the device is not known.",
            "percentunit",
            Ask(f"run:dltrain_mfu:ratio5m{{{RUN}}}"),
            _MFU,
            decimals=1,
            to="dltrain-time",
            none="peak not known",
        ),
        figure(
            "Goodput, last hour",
            "Of the last hour, without waiting for machines: the share that went into steps whose result lasts.",
            "percentunit",
            Ask(f"run:dltrain_goodput:ratio1h{{{RUN}}}"),
            GOODPUT,
            decimals=1,
            to="dltrain-time",
        ),
        figure(
            "Goodput, whole run",
            "The same since the run's first start, restarts of the driver included.",
            "percentunit",
            Ask(f"run:dltrain_goodput:ratio{{{RUN}}}"),
            GOODPUT,
            decimals=1,
            to="dltrain-time",
        ),
        figure(
            "Ranks",
            "Ranks training now.",
            "short",
            Ask(f"max by (run) (dltrain_world_size{{{RUN}}})"),
            decimals=0,
            to="dltrain-ranks",
        ),
    ]


def _health() -> list[Any]:
    return [
        figure(
            "Since the last step",
            "Seconds since an optimizer step was made. Red where DltrainStalled fires for steps of under a minute.",
            "s",
            Ask(f"time() - (max by (run) (dltrain_last_step_timestamp_seconds{{{RUN}}}) > 0)"),
            _SINCE_STEP,
            to="dltrain-time",
            none="no step yet",
        ),
        figure(
            "Age of the last checkpoint",
            "What a loss of all machines would cost.",
            "s",
            Ask(f"time() - (max by (run) (dltrain_checkpoint_last_success_timestamp_seconds{{{RUN}}}) > 0)"),
            _AGE,
            to="dltrain-checkpoints",
            none="none yet",
        ),
        figure(
            "Restarts",
            "Attempts that had to be started again, since the run's first start.",
            "short",
            Ask(f"sum by (run) (dltrain_restarts_total{{{RUN}}})"),
            _RESTARTS,
            decimals=0,
            to="dltrain-time",
        ),
        figure(
            "Alerts firing",
            "Of dltrain's own; docs/runbook.md has a section for each.",
            "short",
            Ask('count(ALERTS{alertname=~"Dltrain.+", alertstate="firing", run=~"$run|"}) or vector(0)', "alerts"),
            _ANY,
            decimals=0,
        ),
        figure(
            "Slowest rank",
            "A rank's own work in a step (waiting for data, forward pass) over the median of all ranks.",
            "suffix:x median",
            Ask(f"max by (run) (run_rank:dltrain_straggler:ratio5m{{{RUN}}})"),
            _STRAGGLER,
            decimals=2,
            to="dltrain-ranks",
        ),
        figure(
            "Waiting for data",
            "Share of the time of steps in which the slowest rank waited for its batch.",
            "percentunit",
            Ask(f"run:dltrain_data_wait:ratio5m{{{RUN}}}"),
            WELL_BELOW,
            decimals=1,
            to="dltrain-data",
        ),
    ]


def _runs() -> Any:
    asks = [
        Ask(f"max by (run, version, zero_stage, precision) (dltrain_run_info{{{RUN}}})"),
        Ask(f"max by (run) (dltrain_steps_total{{{RUN}}})"),
        Ask(f"max by (run) (dltrain_samples_total{{{RUN}}})"),
        Ask(f"sum by (run) (run_state:dltrain_time_seconds:max{{{RUN}}}) / 3600"),
        Ask(f"run:dltrain_goodput_of_wall:ratio{{{RUN}}} * 100"),
    ]
    names = {
        "run": "run",
        "version": "dltrain",
        "zero_stage": "ZeRO",
        "Value #B": "steps",
        "Value #C": "rows",
        "Value #D": "hours",
        "Value #E": "% of all time in steps that last",
    }
    return sheet("Runs", "What is running, and how far it has come.", asks, names, hidden=["Value #A", "__name__"])


def loss_panel() -> Any:
    """The loss of runs."""
    begun = f"and on (run) (max by (run) (dltrain_last_step_timestamp_seconds{{{RUN}}}) > 0)"
    return lines(
        "Loss",
        "Mean loss of the global batch: mean and maximum of what was scraped between two points.",
        "short",
        Ask(f"avg by (run) (avg_over_time(dltrain_loss{{{RUN}}}{_RATE})) {begun}", "{{run}} mean"),
        Ask(f"max by (run) (max_over_time(dltrain_loss{{{RUN}}}{_RATE})) {begun}", "{{run}} max"),
    )


def state_panel() -> Any:
    """Seconds by state."""
    return lines(
        "What the time is spent on",
        "The ledger: every second of a run is of one kind. Booked when it is over: a long start shows as a peak.",
        "percentunit",
        Ask(f"sum by (state) (rate(dltrain_time_seconds_total{{{RUN}}}{_RATE})) > 0", "{{state}}"),
        stack=True,
    )


def learning(links: Sequence[Any]) -> Board:
    """Loss, evaluations, gradients, learning rate."""
    text = "Does it learn? Loss, evaluations, gradients, learning rate, and steps that were left out."
    board = marked(Board("dltrain-learning", "dltrain / Learning", text, [run_variable()], links))
    evaluation = lines(
        "Evaluation",
        "The task's metrics on the evaluation data.",
        "short",
        Ask(f"max by (run, metric) (dltrain_eval{{{RUN}}})", "{{run}} {{metric}}"),
    )
    norm = lines(
        "Gradient norm",
        "Global norm of the gradient before clipping; a rise of tenfold announces divergence.",
        "short",
        Ask(f"max by (run) (max_over_time(dltrain_grad_norm{{{RUN}}}{_RATE})) > 0"),
        log=True,
    )
    rate = lines(
        "Learning rate",
        "Of the last step.",
        "sci",
        Ask(f"max by (run) (dltrain_learning_rate{{{RUN}}})"),
    )
    left_out = lines(
        "Steps left out",
        "Steps that changed no weights: because loss or gradients were not finite, and for any reason.",
        "short",
        Ask(f"sum by (run) (increase(dltrain_nonfinite_steps_total{{{RUN}}}{_RATE}))", "{{run}} not finite"),
        Ask(f"sum by (run) (increase(dltrain_skipped_steps_total{{{RUN}}}{_RATE}))", "{{run}} skipped"),
        as_bars=True,
    )
    steps = lines(
        "Steps per second",
        "Optimizer steps per second of the clock, steps made again included; the mean of 5 minutes.",
        "ops",
        Ask(f"run:dltrain_steps:rate5m{{{RUN}}}"),
    )
    networks = lines(
        "Loss by network",
        "Where a task has several networks, as a GAN has: each one's loss in its own turn; else the loss, as `all`.",
        "short",
        Ask(
            f"max by (run, network) (dltrain_network_loss{{{RUN}}})"
            f' or label_replace(max by (run) (dltrain_loss{{{RUN}}}), "network", "all", "", "")',
            "{{run}} {{network}}",
        ),
    )
    logged = lines(
        "Logged by the task",
        "What the task's callbacks logged: the first 32 names of a run.",
        "short",
        Ask(f"max by (run, name) (dltrain_logged{{{RUN}}})", "{{run}} {{name}}"),
    )
    board.row("Loss", 10, [loss_panel(), networks, evaluation])
    board.row("Optimizer", 8, [norm, rate, logged])
    board.row("Steps", 7, [left_out, steps])
    return board


def time(links: Sequence[Any]) -> Board:
    """Steps, phases, goodput and its losses."""
    text = "Why is it slow? The length of steps, their phases, and what else the time is spent on."
    board = marked(Board("dltrain-time", "dltrain / Time", text, [run_variable(), _rank_variable()], links))
    board.row("Steps", 8, [_step_seconds(), _step_spread(), _phases()])
    board.row("Speed", 8, _hardware())
    board.row("Goodput", 9, [_goodput(), state_panel(), _states()])
    return board


def _step_seconds() -> Any:
    buckets = f"sum by (run, le) (rate(dltrain_step_seconds_bucket{{{RUN}}}{_RATE}))"
    return lines(
        "Step time",
        "Optimizer steps of rank 0: quantiles of the histogram, and the exact mean.",
        "s",
        Ask(f"histogram_quantile(0.5, {buckets})", "{{run}} p50"),
        Ask(f"histogram_quantile(0.99, {buckets})", "{{run}} p99"),
        Ask(
            f"sum by (run) (rate(dltrain_step_seconds_sum{{{RUN}}}{_RATE})) "
            f"/ (sum by (run) (rate(dltrain_step_seconds_count{{{RUN}}}{_RATE})) > 0)",
            "{{run}} mean",
        ),
    )


def _step_spread() -> Any:
    return spread(
        "Distribution of step times",
        "How many steps took how long. Two bands are two kinds of steps, as with data that comes in bursts.",
        "s",
        Ask(f"sum by (le) (increase(dltrain_step_seconds_bucket{{{RUN}}}{_RATE}))", "{{le}}"),
        buckets=True,
    )


def _phases() -> Any:
    return lines(
        "Phases of a step",
        "Mean over the chosen ranks. backward includes the aggregation of gradients, and so the wait for slower ranks.",
        "s",
        Ask(
            f"sum by (phase) (rate(dltrain_step_phase_seconds_total{{{_RANK}}}{_RATE})) "
            f"/ on () group_left () (sum(rate(dltrain_rank_steps_total{{{_RANK}}}{_RATE})) > 0)",
            "{{phase}}",
        ),
        stack=True,
    )


def _hardware() -> list[Any]:
    return [
        lines(
            "Tokens per second and rank",
            "Units that losses are means over, by the ranks that train.",
            "cps",
            Ask(f"run:dltrain_tokens_per_rank:rate5m{{{RUN}}}"),
        ),
        lines(
            "Model FLOPs per second",
            "Over all ranks: forward and backward pass, recomputation left out.",
            "flops",
            Ask(f"sum by (run) (rate(dltrain_model_flops_total{{{RUN}}}{_RATE}))"),
        ),
        lines(
            "MFU",
            "Those by the dense peak of all devices. No curve where the peak is not known.",
            "percentunit",
            Ask(f"run:dltrain_mfu:ratio5m{{{RUN}}}"),
        ),
        lines(
            "Gradients handed over",
            "Bytes per second that each rank hands over to be aggregated.",
            "Bps",
            Ask(f"sum by (run) (rate(dltrain_gradient_bytes_total{{{RUN}}}{_RATE}))"),
        ),
    ]


def _goodput() -> Any:
    return lines(
        "Goodput",
        "Share of the time that went into steps whose result lasts: of the last hour, of the whole run, and of all the "
        "time that passed, waiting for machines included.",
        "percentunit",
        Ask(f"run:dltrain_goodput:ratio1h{{{RUN}}}", "{{run}} last hour"),
        Ask(f"run:dltrain_goodput:ratio{{{RUN}}}", "{{run}} whole run"),
        Ask(f"run:dltrain_goodput_of_wall:ratio{{{RUN}}}", "{{run}} of all time"),
        steps=((None, "transparent"), (0.9, "green")),
        top=1,
    )


def _states() -> Any:
    return bars(
        "Time since the first start",
        "Everything but compute is a loss: what to work on first is at the top.",
        "s",
        Ask(f"sort_desc(sum by (state) (run_state:dltrain_time_seconds:max{{{RUN}}}))", "{{state}}"),
    )


def ranks(links: Sequence[Any]) -> Board:
    """Who is slow, who waits, who is full."""
    text = (
        "Is one rank holding up the others? All ranks' steps are as long as the slowest one's, so only a rank's own "
        "work is compared: waiting for data and the forward pass. At ZeRO 3 the forward pass waits for others as well."
    )
    board = marked(Board("dltrain-ranks", "dltrain / Ranks", text, [run_variable(), _rank_variable()], links))
    ratio = f"run_rank:dltrain_straggler:ratio5m{{{_RANK}}}"
    slowest = bars(
        "Slowest five",
        "Own work over the median of all ranks.",
        "suffix:x median",
        Ask(f"topk(5, {ratio})", "{{run}} rank {{rank}}"),
        _STRAGGLER,
    )
    distribution = spread(
        "Distribution over ranks",
        "How many ranks are how far from the median.",
        "suffix:x median",
        Ask(ratio, "{{run}} rank {{rank}}"),
        buckets=False,
    )
    course = cells(
        "Own work over the median",
        "The 32 ranks that were slowest at any time shown; the variable picks others.",
        "suffix:x median",
        Ask(f"{ratio} and on (run, rank) topk(32, max_over_time({ratio}[$__range] @ end()))", "{{run}} rank {{rank}}"),
        _STRAGGLER,
    )
    board.row("Stragglers", 9, [slowest, distribution])
    board.row("Course", 10, [course])
    board.row("What ranks do", 8, _rank_lines())
    return board


def _rank_lines() -> list[Any]:
    def each(name: str, by: str = "run, rank") -> str:
        return f"sum by ({by}) (rate({name}{{{_RANK}}}{_RATE}))"

    waits = f'sum by (run, rank) (rate(dltrain_step_phase_seconds_total{{{_RANK}, phase="data_wait"}}{_RATE}))'
    return [
        lines(
            "Waiting for data, per step",
            "The ten ranks that wait longest for their batches.",
            "s",
            Ask(f"topk(10, {waits} / ({each('dltrain_rank_steps_total')} > 0))", "{{run}} rank {{rank}}"),
        ),
        lines(
            "Batches that are ready",
            "Steps whose batches wait in memory: the ten ranks with fewest. Zero all the time: reading is too slow.",
            "short",
            Ask(f"bottomk(10, max by (run, rank) (dltrain_prefetch_queue_depth{{{_RANK}}}))", "{{run}} rank {{rank}}"),
        ),
        lines(
            "Peak memory",
            "Most that a rank has held: the GPU's memory, or the process's on CPUs. The ten largest.",
            "bytes",
            Ask(f"topk(10, max by (run, rank) (dltrain_device_memory_peak_bytes{{{_RANK}}}))", "{{run}} rank {{rank}}"),
        ),
        lines(
            "Steps reported per second",
            "The ten ranks with fewest; all ranks make the same steps.",
            "ops",
            Ask(f"bottomk(10, {each('dltrain_rank_steps_total')} > 0)", "{{run}} rank {{rank}}"),
        ),
    ]
