"""The pods of a run: the head with the driver, the workers with the ranks, the submitter.

    head_group(plan), worker_group(plan), submitter(plan)      # as they stand in a RayJob

All of them pass Pod Security's `restricted` (RDMA wants IPC_LOCK, which only `privileged` lets through) and are of
the Guaranteed class, so that a neighbour's appetite is not what evicts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dltrain.deploying.options import RAY_PORTS, Options, Plan
from dltrain.deploying.quantity import mebibytes, quantity

__all__ = [
    "DRIVER_PORT",
    "SPEC_FILE",
    "SPEC_KEY",
    "capabilities_of",
    "head_group",
    "labels_of",
    "submitter",
    "times",
    "worker_group",
]

SPEC_KEY = "spec.yaml"
_SPEC_DIR = "/etc/dltrain"
SPEC_FILE = f"{_SPEC_DIR}/{SPEC_KEY}"
# A port's name has at most 15 characters.
DRIVER_PORT = "dltrain-metrics"
# The service of the head has what its container declares: whoever declares one port must declare them all.
_HEAD_PORTS = ("gcs-server", "dashboard", "client", "metrics", "as-metrics", "dash-metrics")
_USER = 1000
_SPOT_TAINTS = (
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
    ("karpenter.sh/capacity-type", "spot"),
)

Object = dict[str, Any]


def labels_of(name: str) -> dict[str, str]:
    """What ties everything of one run together."""
    return {"app.kubernetes.io/part-of": "dltrain", "app.kubernetes.io/instance": name}


def capabilities_of(options: Options) -> tuple[str, ...]:
    """What workers are given beyond Pod Security's `restricted`."""
    return ("IPC_LOCK",) if options.rdma else ()


def times(grace_seconds: int) -> tuple[int, int]:
    """How a pod's grace period is spent: seconds for the preStop hook, then seconds for Ray to drain its node."""
    drain = min(30, grace_seconds // 5)
    return grace_seconds - drain - 5, drain


def head_group(plan: Plan) -> Object:
    """The head: no tasks are placed there, only the driver and what Ray needs."""
    options = plan.options
    wait, drain = times(options.head_grace_seconds)
    shm = mebibytes(quantity(options.head_memory) / 4)
    own = {
        "DLTRAIN_RUNS": plan.spec.runs,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": drain,
        # When the RayJob is deleted the driver is told to stop; by default it would be killed 3 seconds later.
        "RAY_JOB_STOP_WAIT_TIME_S": wait,
    }
    container = {
        **_container(plan, "ray-head", {**own, **options.env}, {"cpu": "2", "memory": options.head_memory}),
        "ports": [{"name": DRIVER_PORT, "containerPort": plan.spec.metrics.port}]
        + [{"name": name, "containerPort": RAY_PORTS[name]} for name in _HEAD_PORTS],
        # KubeRay ends a cluster without a word to the job: the driver is asked here to save and to end as failed.
        "lifecycle": _pre_stop("python", "-m", "dltrain.deploying.stop_driver", SPEC_FILE, str(wait)),
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "spec", "mountPath": _SPEC_DIR, "readOnly": True},
        ],
    }
    volumes = [_shm(shm), {"name": "spec", "configMap": {"name": plan.name}}]
    return {
        "resources": {"CPU": "0"},
        "rayStartParams": _start_params(shm),
        "template": _template(plan, "head", container, volumes, options.head_grace_seconds),
    }


def worker_group(plan: Plan) -> Object:
    """The workers: as many as there are from first to last, for training is synchronous."""
    options = plan.options
    wait, drain = times(options.grace_seconds)
    own = {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": drain,
        # Ray would have ranks yield to everything else in the pod.
        "RAY_worker_niceness": 0,
    }
    limits = {"cpu": str(plan.cpus), "memory": plan.memory}
    limits |= {"nvidia.com/gpu": str(options.gpus)} if options.gpus else {}
    limits |= {name: str(count) for name, count in options.rdma.items()}
    container = {
        **_container(plan, "ray-worker", {**own, **options.env}, limits, capabilities_of(options)),
        "lifecycle": _pre_stop("dltrain", "drain", "--wait", str(wait)),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes = [_shm(plan.shm)]
    if cache := plan.spec.data.cache:
        # A tenth more: files in the making, and the file system's own.
        volumes.append({"name": "data-cache", "emptyDir": {"sizeLimit": mebibytes(int(cache.gb * 1.1e9))}})
        container["volumeMounts"].append({"name": "data-cache", "mountPath": cache.dir})
    template = _template(plan, "worker", container, volumes, options.grace_seconds)
    template["spec"]["tolerations"] = _tolerations(plan)
    if options.node_selector:
        template["spec"]["nodeSelector"] = dict(options.node_selector)
    return {
        "groupName": "workers",
        "replicas": plan.pods,
        "minReplicas": plan.pods,
        "maxReplicas": plan.pods,
        "numOfHosts": 1,
        "resources": {"CPU": str(plan.ray_cpus), **{name: str(n) for name, n in plan.ray_resources.items()}},
        "rayStartParams": _start_params(plan.shm),
        "template": template,
    }


def submitter(plan: Plan) -> Object:
    """The pod that submits the job and follows its log; KubeRay's own has no security context."""
    container = _container(plan, "ray-job-submitter", {}, {"cpu": "500m", "memory": "1Gi"})
    del container["env"]
    container.pop("envFrom", None)
    template = _template(plan, "submitter", container, [], None)
    template["spec"]["restartPolicy"] = "Never"
    return template


# ---- parts ----


def _container(
    plan: Plan, name: str, env: Mapping[str, Any], limits: Mapping[str, str], add: Sequence[str] = ()
) -> Object:
    capabilities: Object = {"drop": ["ALL"]}
    container: Object = {
        "name": name,
        "image": plan.options.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": key, "value": str(value)} for key, value in env.items()],
        # Requests that equal the limits: the Guaranteed class.
        "resources": {"requests": dict(limits), "limits": dict(limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {**capabilities, "add": list(add)} if add else capabilities,
        },
    }
    if plan.options.s3_secret:
        container["envFrom"] = [{"secretRef": {"name": plan.options.s3_secret}}]
    return container


def _template(plan: Plan, component: str, container: Object, volumes: list[Object], grace: int | None) -> Object:
    spec: Object = {
        "serviceAccountName": plan.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
    }
    if grace is not None:
        spec["terminationGracePeriodSeconds"] = grace
    if volumes:
        spec["volumes"] = volumes
    if plan.options.pull_secret:
        spec["imagePullSecrets"] = [{"name": plan.options.pull_secret}]
    return {
        "metadata": {"labels": {**labels_of(plan.name), "app.kubernetes.io/component": component}},
        "spec": spec,
    }


def _pre_stop(*command: str) -> Object:
    return {"preStop": {"exec": {"command": list(command)}}}


def _shm(size: str) -> Object:
    return {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}


def _start_params(shm: str) -> dict[str, str]:
    """Half of /dev/shm is for Ray's objects, which are small here; NCCL has the other half."""
    return {"object-store-memory": str(int(quantity(shm) / 2))}


def _tolerations(plan: Plan) -> list[Object]:
    found: list[Object] = []
    if plan.options.gpus:
        found.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if plan.options.spot:
        found += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in _SPOT_TAINTS
        ]
    return found
