"""The dashboards of what training rests on: Data, Checkpoints, GPUs, Cluster.

data(links).json()

GPUs are dcgm-exporter's series, the cluster's are Ray's and KubeRay's: they are there where those are scraped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.monitoring.boards_training import RUN, WELL_BELOW, marked, run_variable
from cluster.monitoring.panels import Ask, Board, Steps, cells, figure, lines, query_variable, sheet

__all__ = ["checkpoints", "data", "gpus", "hosts"]

_RATE = "[$__rate_interval]"
_AGE: Steps = ((None, "transparent"), (7200, "red"))
_POD = 'exported_pod=~"$pod"'
_RAY = 'ray_io_cluster=~"$cluster"'
_GPU = "{{Hostname}} GPU {{gpu}} {{exported_pod}}"


def data(links: Sequence[Any]) -> Board:
    """Reading: how much, how fast, what goes wrong."""
    text = "Is reading fast enough, and what goes wrong with it? Sums over the readers of all ranks."
    board = marked(Board("dltrain-data", "dltrain / Data", text, [run_variable()], links))
    board.row("Enough?", 8, [_wait_share(), _ready(), _read()])
    board.row("Storage", 8, [_request_seconds(), _requests(), _retries()])
    board.row("Cache and rows", 8, [_cache_share(), _cache(), _row_bytes()])
    return board


def _wait_share() -> Any:
    return lines(
        "Waiting for data",
        "Share of the time of steps in which the slowest rank waited for its batch. Over 10 % DltrainDataBound fires.",
        "percentunit",
        Ask(f"run:dltrain_data_wait:ratio5m{{{RUN}}}"),
        steps=((None, "transparent"), (WELL_BELOW[-1][0], "red")),
    )


def _ready() -> Any:
    return lines(
        "Batches that are ready",
        "Steps whose batches wait in memory: the rank with fewest, and the mean.",
        "short",
        Ask(f"min by (run) (dltrain_prefetch_queue_depth{{{RUN}}})", "{{run}} fewest"),
        Ask(f"avg by (run) (dltrain_prefetch_queue_depth{{{RUN}}})", "{{run}} mean"),
    )


def _read() -> Any:
    return lines(
        "Read from storage",
        "Bytes per second, without what came from the nodes' caches.",
        "Bps",
        Ask(f"sum by (run) (rate(dltrain_s3_read_bytes_total{{{RUN}}}{_RATE}))"),
    )


def _request_seconds() -> Any:
    return lines(
        "Time of a request",
        "Mean, of requests that were answered with data.",
        "s",
        Ask(
            f"sum by (run) (rate(dltrain_s3_read_seconds_total{{{RUN}}}{_RATE})) "
            f'/ (sum by (run) (rate(dltrain_s3_requests_total{{{RUN}, outcome="ok"}}{_RATE})) > 0)'
        ),
    )


def _requests() -> Any:
    return lines(
        "Requests by outcome",
        "Everything but ok is asked again, except what was refused.",
        "reqps",
        Ask(f"sum by (op, outcome) (rate(dltrain_s3_requests_total{{{RUN}}}{_RATE}))", "{{op}} {{outcome}}"),
        stack=True,
    )


def _retries() -> Any:
    return lines(
        "Asked again",
        "Requests made again, by why; and slow parts that were asked for a second time.",
        "reqps",
        Ask(f"sum by (reason) (rate(dltrain_data_retries_total{{{RUN}}}{_RATE}))", "{{reason}}"),
        Ask(f"sum(rate(dltrain_data_hedges_total{{{RUN}}}{_RATE}))", "slow"),
        stack=True,
    )


def _cache_share() -> Any:
    found = f"sum by (run) (rate(dltrain_data_cache_requests_total{{{RUN}}}{_RATE})) > 0"
    return lines(
        "Found in the cache",
        "Share of the row groups that were looked up in the node's cache (data.cache).",
        "percentunit",
        Ask(f'sum by (run) (rate(dltrain_data_cache_requests_total{{{RUN}, outcome="hit"}}{_RATE})) / ({found})'),
        top=1,
    )


def _cache() -> Any:
    return lines(
        "Looked up in the cache",
        "damaged: the checksum was wrong and it was read again; error: the cache's disk failed.",
        "ops",
        Ask(f"sum by (outcome) (rate(dltrain_data_cache_requests_total{{{RUN}}}{_RATE}))", "{{outcome}}"),
        stack=True,
    )


def _row_bytes() -> Any:
    return lines(
        "Read per row trained on",
        "Bytes of storage for each row. More than a row has: row groups are read that are hardly used.",
        "bytes",
        Ask(
            f"sum by (run) (rate(dltrain_s3_read_bytes_total{{{RUN}}}{_RATE})) "
            f"/ (sum by (run) (rate(dltrain_samples_total{{{RUN}}}{_RATE})) > 0)"
        ),
    )


def checkpoints(links: Sequence[Any]) -> Board:
    """Saving: how old, how long, how large, what failed; and what restarts cost."""
    text = "What would a loss cost, and what does saving cost?"
    board = marked(Board("dltrain-checkpoints", "dltrain / Checkpoints", text, [run_variable()], links))
    board.row("Now", 4, _saved())
    board.row("Saving", 8, [_age(), _save_seconds(), _save_rate()])
    board.row("Cost", 8, [_stall(), _failures(), _lost()])
    return board


def _saved() -> list[Any]:
    last = f"max by (run) (dltrain_checkpoint_last_success_timestamp_seconds{{{RUN}}}) > 0"
    return [
        figure(
            "Age",
            "Seconds since the last checkpoint was made.",
            "s",
            Ask(f"time() - ({last})"),
            ((None, "green"), (3600, "orange"), (7200, "red")),
            none="none yet",
        ),
        figure(
            "Time between the last two",
            "Twice that, and two hours at least, may pass before DltrainCheckpointTooOld fires.",
            "s",
            Ask(f"max by (run) (dltrain_checkpoint_interval_seconds{{{RUN}}})"),
        ),
        figure(
            "Size",
            "Of the last checkpoint.",
            "bytes",
            Ask(f"max by (run) (dltrain_checkpoint_bytes{{{RUN}}})"),
        ),
        figure(
            "Failures",
            "Checkpoints that could not be written; training went on.",
            "short",
            Ask(f"sum by (run) (dltrain_checkpoint_failures_total{{{RUN}}})"),
            ((None, "green"), (1, "red")),
            decimals=0,
        ),
        figure(
            "Steps between snapshots",
            "Snapshots in memory: a worker that dies costs at most so many steps.",
            "short",
            Ask(f"max by (run) (dltrain_snapshot_every_steps{{{RUN}}})"),
            decimals=0,
        ),
        figure(
            "Restarts",
            "Since the run's first start.",
            "short",
            Ask(f"sum by (run) (dltrain_restarts_total{{{RUN}}})"),
            ((None, "green"), (1, "orange"), (4, "red")),
            decimals=0,
        ),
    ]


def _age() -> Any:
    return lines(
        "Age of the last checkpoint",
        "A saw: its teeth are the interval.",
        "s",
        Ask(f"time() - (max by (run) (dltrain_checkpoint_last_success_timestamp_seconds{{{RUN}}}) > 0)"),
        steps=_AGE,
    )


def _each_save(selector: str) -> str:
    made = f"sum by (run) (changes(dltrain_checkpoint_last_success_timestamp_seconds{{{RUN}}}[1h])) > 0"
    seconds = f"sum by (run, blocking) (increase(dltrain_checkpoint_seconds_total{{{selector}}}[1h]))"
    return f"{seconds} / on (run) group_left () ({made})"


def _save_seconds() -> Any:
    return lines(
        "Time of a checkpoint",
        "Mean of the last hour. blocking yes: training stood still; no: it went on while files were written.",
        "s",
        Ask(_each_save(RUN), "{{run}} blocking {{blocking}}"),
    )


def _save_rate() -> Any:
    seconds = _each_save(f'{RUN}, blocking="no"')
    return lines(
        "Written per second",
        "Size of the last checkpoint by the mean time that rank 0 took to write its file.",
        "Bps",
        Ask(f"max by (run) (dltrain_checkpoint_bytes{{{RUN}}}) / on (run) (sum by (run) ({seconds}) > 0)"),
    )


def _stall() -> Any:
    return lines(
        "Time that saving takes",
        "Share of the time that training stood still for it, and that writing in the background took.",
        "percentunit",
        Ask(
            f"sum by (run, blocking) (rate(dltrain_checkpoint_seconds_total{{{RUN}}}{_RATE}))",
            "{{run}} blocking {{blocking}}",
        ),
    )


def _failures() -> Any:
    return lines(
        "Failures and restarts",
        "Checkpoints that could not be written; attempts started again, by why.",
        "short",
        Ask(f"sum by (run) (increase(dltrain_checkpoint_failures_total{{{RUN}}}{_RATE}))", "{{run}} not written"),
        Ask(f"sum by (run, reason) (increase(dltrain_restarts_total{{{RUN}}}{_RATE}))", "{{run}} restart: {{reason}}"),
        as_bars=True,
    )


def _lost() -> Any:
    states = "checkpoint_stall|redone|detecting|recovering|resizing"
    return lines(
        "What faults have cost",
        "Seconds since the first start: standing still for checkpoints, steps made again, noticing, coming back.",
        "s",
        Ask(f'sum by (state) (run_state:dltrain_time_seconds:max{{{RUN}, state=~"{states}"}})', "{{state}}"),
        stack=True,
    )


def gpus(links: Sequence[Any]) -> Board:
    """dcgm-exporter's view of the devices, beside dltrain's."""
    text = (
        "What the GPUs do, by dcgm-exporter. SM and tensor activity are profiling fields that its default list of "
        "counters lacks: take dcp-metrics-included.csv and add DCGM_FI_PROF_SM_ACTIVE."
    )
    pod = query_variable("pod", "Pod", "label_values(DCGM_FI_DEV_GPU_UTIL, exported_pod)")
    board = marked(Board("dltrain-gpus", "dltrain / GPUs", text, [run_variable(), pod], links))
    board.row("Busy?", 8, _gpu_work())
    board.row("Memory", 8, _gpu_memory())
    board.row("Health", 8, _gpu_health())
    return board


def _dcgm(title: str, text: str, unit: str, field: str, steps: Steps = (), top: float | None = None) -> Any:
    return lines(title, text, unit, Ask(f"{field}{{{_POD}}}", _GPU), steps=steps, top=top)


def _gpu_work() -> list[Any]:
    return [
        _dcgm(
            "Tensor cores active",
            "Share of cycles in which the tensor pipe is busy: what MFU is made of.",
            "percentunit",
            "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
            top=1,
        ),
        _dcgm(
            "Multiprocessors active",
            "Share of cycles in which a multiprocessor has work.",
            "percentunit",
            "DCGM_FI_PROF_SM_ACTIVE",
            top=1,
        ),
        _dcgm(
            "Utilization",
            "Share of the time in which any kernel ran: high also while a collective waits.",
            "percent",
            "DCGM_FI_DEV_GPU_UTIL",
            top=100,
        ),
        lines(
            "MFU",
            "Model FLOPs per second by the dense peak of all devices, as dltrain counts them; and that peak.",
            "percentunit",
            Ask(f"run:dltrain_mfu:ratio5m{{{RUN}}}", "{{run}}"),
        ),
    ]


def _gpu_memory() -> list[Any]:
    return [
        _dcgm("Memory in use", "Frame buffer, torch's cache included.", "mbytes", "DCGM_FI_DEV_FB_USED"),
        lines(
            "Peak of torch's own",
            "The largest of all ranks: what was really needed.",
            "bytes",
            Ask(f"max by (run) (dltrain_device_memory_peak_bytes{{{RUN}}})"),
        ),
        lines(
            "Allocations tried again",
            "torch had to give memory back first: the micro-batch is close to too large.",
            "short",
            Ask(f"sum by (run) (increase(dltrain_alloc_retries_total{{{RUN}}}{_RATE}))"),
            as_bars=True,
        ),
        lines(
            "Peak of the device",
            "Dense bf16 FLOPs per second of one device, which MFU is a share of.",
            "flops",
            Ask(f"max by (run, device) (dltrain_device_peak_flops{{{RUN}}})", "{{run}} {{device}}"),
        ),
    ]


def _gpu_health() -> list[Any]:
    return [
        _dcgm("Power", "Watts drawn.", "watt", "DCGM_FI_DEV_POWER_USAGE"),
        _dcgm(
            "Temperature",
            "Clocks go down from about 85 degrees on.",
            "celsius",
            "DCGM_FI_DEV_GPU_TEMP",
            steps=((None, "transparent"), (85, "red")),
        ),
        _dcgm("Last XID error", "Number of the last error, 0 for none: it stays.", "short", "DCGM_FI_DEV_XID_ERRORS"),
        _dcgm(
            "NVLink",
            "Both directions, all lanes. A gauge in MB/s, although dcgm-exporter calls it a counter.",
            "MBs",
            "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL",
        ),
        _dcgm(
            "Rows remapped",
            "After errors that could not be corrected; a device with many is to be replaced.",
            "short",
            "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS",
        ),
    ]


def hosts(links: Sequence[Any]) -> Board:
    """Ray's nodes and KubeRay's jobs."""
    text = "What the run stands on: KubeRay's jobs, and the nodes as Ray sees them."
    cluster = query_variable("cluster", "Ray cluster", "label_values(ray_node_cpu_count, ray_io_cluster)")
    board = Board("dltrain-cluster", "dltrain / Cluster", text, [cluster], links)
    alerts = 'ALERTS{alertname=~"Dltrain.+", alertstate="firing"}'
    board.mark("Alerts", alerts, "orange", "{{alertname}}", "{{run}}{{name}}")
    board.row("KubeRay", 8, _kuberay())
    board.row("Nodes", 8, _nodes())
    board.row("Memory and network", 8, _memory())
    return board


def _kuberay() -> list[Any]:
    jobs = "max by (namespace, name, deployment_status) (kuberay_job_deployment_status)"
    known = "max by (namespace, name) (kuberay_job_info)"
    return [
        sheet(
            "Jobs",
            "RayJobs and where they are now.",
            [Ask(f"{jobs} * on (namespace, name) group_left () {known}", "{{namespace}}/{{name}}")],
            {"name": "job", "deployment_status": "status"},
            hidden=["Value", "Value #A"],
        ),
        lines(
            "Time of tries",
            "From Initializing to the end of a try. A retry_count above 0: backoffLimit has made a new cluster.",
            "s",
            Ask(
                "max by (name, job_deployment_status, retry_count) (kuberay_job_execution_duration_seconds)",
                "{{name}} {{job_deployment_status}} {{retry_count}}",
            ),
        ),
        cells(
            "Clusters provisioned",
            "Green: all pods were up at least once.",
            "bool_yes_no",
            Ask(
                'max by (name) (kuberay_cluster_condition_provisioned{condition="true"}) '
                'or 0 * max by (name) (kuberay_cluster_condition_provisioned{condition="false"})',
                "{{name}}",
            ),
            ((None, "red"), (1, "green")),
        ),
        lines(
            "Time to provision",
            "From the cluster's creation until all pods were up.",
            "s",
            Ask("max by (name) (kuberay_cluster_provisioned_duration_seconds)", "{{name}}"),
        ),
    ]


def _nodes() -> list[Any]:
    return [
        lines(
            "CPU",
            "Of each node.",
            "percent",
            Ask(f"max by (instance) (ray_node_cpu_utilization{{{_RAY}}})", "{{instance}}"),
            top=100,
        ),
        lines(
            "CPUs in use and free",
            "As Ray has given them out.",
            "short",
            Ask(f'sum by (State) (ray_resources{{Name="CPU", {_RAY}}})', "{{State}}"),
            stack=True,
        ),
        lines(
            "Placement groups",
            "Each slot of a run is one; PENDING: a machine is missing.",
            "short",
            Ask(f"sum by (State) (ray_placement_groups{{{_RAY}}})", "{{State}}"),
            stack=True,
        ),
        lines(
            "Disk in use",
            "Of each node. A full one ends checkpoints and logs.",
            "percent",
            Ask(f"max by (instance) (ray_node_disk_utilization_percentage{{{_RAY}}})", "{{instance}}"),
            steps=((None, "transparent"), (90, "red")),
            top=100,
        ),
    ]


def _memory() -> list[Any]:
    return [
        lines(
            "Memory in use",
            "Share of each node's, /dev/shm included.",
            "percentunit",
            Ask(
                f"max by (instance) (ray_node_mem_used{{{_RAY}}}) / max by (instance) (ray_node_mem_total{{{_RAY}}})",
                "{{instance}}",
            ),
            steps=((None, "transparent"), (0.9, "red")),
            top=1,
        ),
        lines(
            "Object store",
            "Bytes of Ray's objects; dltrain keeps none of its data there.",
            "bytes",
            Ask(f"sum by (Location) (ray_object_store_memory{{{_RAY}}})", "{{Location}}"),
            stack=True,
        ),
        lines(
            "Killed for memory",
            "Processes that Ray ended because a node was running out of memory.",
            "short",
            Ask(
                f"sum by (instance) (increase(ray_memory_manager_worker_eviction_total{{{_RAY}}}[5m]))", "{{instance}}"
            ),
            as_bars=True,
        ),
        lines(
            "Network",
            "Of each node, out and in.",
            "Bps",
            Ask(f"max by (instance) (ray_node_network_send_speed{{{_RAY}}})", "{{instance}} out"),
            Ask(f"max by (instance) (ray_node_network_receive_speed{{{_RAY}}})", "{{instance}} in"),
        ),
    ]
