"""Series of what a machine without GPUs and Kubernetes can't make, with the names and labels of their sources.

Path("recorded.om").write_text(openmetrics(start=t0, seconds=600))     # promtool tsdb create-blocks-from openmetrics

dcgm-exporter (its etc/*.csv, and the labels it adds on Kubernetes), KubeRay's operator
(ray-operator/controllers/ray/metrics), and what dltrain itself exports where the device's peak is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

__all__ = ["NAMES", "RUN", "openmetrics"]

RUN = "recorded"
_STEP = 15

_GPU = 'gpu="{i}", UUID="GPU-{i}", device="nvidia{i}", modelName="NVIDIA H100 80GB HBM3", Hostname="node-a", '
_GPU += 'exported_namespace="ml", exported_pod="demo-x7k2p-gpu-worker-a", exported_container="ray-worker"'
_JOB = 'name="demo", namespace="ml"'
_CLUSTER = 'name="demo-x7k2p", namespace="ml"'
_NODE = 'instance="10.0.0.7:8080", ray_io_cluster="demo-x7k2p"'

# name, labels, value after so many seconds
_Row = tuple[str, str, Callable[[float], float]]


def _constant(value: float) -> Callable[[float], float]:
    return lambda _: value


def _devices() -> Iterator[_Row]:
    figures = {
        "DCGM_FI_DEV_GPU_UTIL": 97.0,
        "DCGM_FI_PROF_SM_ACTIVE": 0.8,
        "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0.45,
        "DCGM_FI_DEV_FB_USED": 61_440.0,
        "DCGM_FI_DEV_POWER_USAGE": 640.0,
        "DCGM_FI_DEV_GPU_TEMP": 62.0,
        "DCGM_FI_DEV_XID_ERRORS": 0.0,
        "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": 200_000.0,
        "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS": 0.0,
    }
    for name, value in figures.items():
        for i in range(2):
            yield name, _GPU.replace("{i}", str(i)), _constant(value + i)


def _others() -> Iterator[_Row]:
    yield "kuberay_job_info", _JOB, _constant(1)
    yield "kuberay_job_deployment_status", f'{_JOB}, deployment_status="Running"', _constant(1)
    retried = f'{_JOB}, job_deployment_status="Retrying", retry_count="0"'
    yield "kuberay_job_execution_duration_seconds", retried, _constant(3600)
    yield "kuberay_cluster_condition_provisioned", f'{_CLUSTER}, condition="true"', _constant(1)
    yield "kuberay_cluster_provisioned_duration_seconds", _CLUSTER, _constant(42)
    yield "ray_memory_manager_worker_eviction_total", f'{_NODE}, Name="", Type="worker"', lambda s: s // 200
    yield "ray_node_cpu_count", _NODE, _constant(16)
    yield "dltrain_device_peak_flops", f'run="{RUN}", device="NVIDIA H100 80GB HBM3"', _constant(989e12)
    yield "dltrain_world_size", f'run="{RUN}"', _constant(2)
    yield "dltrain_model_flops_total", f'run="{RUN}"', lambda s: s * 2 * 0.4 * 989e12
    yield "ALERTS", f'alertname="DltrainDataBound", alertstate="firing", run="{RUN}", severity="warning"', _constant(1)


_ROWS = (*_devices(), *_others())
# What only this has, and what the rules make of it; without what a live run on this machine has as well.
_LIVE = {"dltrain_model_flops_total", "dltrain_world_size", "ray_node_cpu_count"}
NAMES = frozenset(name for name, _, _ in _ROWS) - _LIVE | {"run:dltrain_mfu:ratio5m"}


def openmetrics(start: float, seconds: int) -> str:
    """The text of all series from a Unix time on."""
    lines = []
    for name, labels, value in _ROWS:
        series = f"{name}{{{labels.replace(', ', ',')}}}"
        lines += [f"{series} {value(s)} {start + s}" for s in range(0, seconds + 1, _STEP)]
    return "\n".join([*lines, "# EOF"]) + "\n"
