"""A run on Kubernetes as complete manifests, made of its spec: what `dltrain k8s` prints.

    objects = build(load_spec("job.yaml"), Options(image="registry/dltrain:1"), "job.yaml")
    print(to_yaml(objects))                       # kubectl apply -f -

ConfigMap with the spec, ServiceAccount, RayJob, NetworkPolicy, PodMonitor. `build` refuses to return an object that
KubeRay's operator, Kueue or Pod Security would refuse (see rules.py). No secret's value is ever in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import yaml

from dltrain.deploying.options import METRICS_HOST, Options, Plan, resolve
from dltrain.deploying.pods import (
    DRIVER_PORT,
    SPEC_FILE,
    SPEC_KEY,
    Object,
    capabilities_of,
    head_group,
    labels_of,
    submitter,
    worker_group,
)
from dltrain.deploying.rules import check
from dltrain.errors import SpecError
from dltrain.spec import JobSpec

__all__ = ["build", "notes", "objects_of", "scraped", "spec_text", "to_yaml"]

# Ray's own of the head's ports that are scraped, and the workers' one.
_RAY_METRICS = ("metrics", "as-metrics", "dash-metrics")
# A runaway is cut off; a run of 1,024 ranks has 10,000 series, a node of Ray's 1,000.
_SAMPLE_LIMIT = 50_000


def build(spec: JobSpec, options: Options, source: str = "spec") -> list[Object]:
    """The objects, checked.

    Raises:
        SpecError: the spec can't run so, or an object would be refused; all reasons at once.
    """
    objects = objects_of(resolve(spec, options, source))
    if found := check(objects, capabilities_of(options)):
        raise SpecError(source, [str(finding) for finding in found])
    return objects


def objects_of(plan: Plan) -> list[Object]:
    """The objects, in the order in which they are best applied."""
    monitor = [_pod_monitor(plan)] if plan.options.monitor else []
    return [_config_map(plan), _service_account(plan), _network_policy(plan), *monitor, _ray_job(plan)]


def notes(spec: JobSpec, options: Options) -> list[str]:
    """What can't be seen in the objects and may still be in the way."""
    found = [
        f"{where}: {url!r} is a path in the image; data in object storage has a URL"
        for where, url in [
            *((f"data ({source.name})", source.url) for source in spec.data.sources),
            *([("data.eval", spec.data.eval)] if spec.data.eval else []),
        ]
        if urlsplit(url).scheme in ("", "file")
    ]
    if options.rdma:
        where = options.namespace or "NAMESPACE"
        found.append(
            "RDMA locks memory (IPC_LOCK), which Pod Security lets through at its level `privileged` only: "
            f"kubectl label namespace {where} pod-security.kubernetes.io/enforce=privileged"
        )
    if not options.s3_secret and not options.identity:
        found.append("pods have no credentials but those of their nodes: give --s3-secret or --identity for others")
    return found


def spec_text(spec: JobSpec) -> str:
    """What was said of the spec, without what is left to the defaults: as long as a person would write it."""
    said = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return str(yaml.safe_dump(said, sort_keys=False))


def to_yaml(objects: Sequence[Any]) -> str:
    """YAML documents; text of several lines stays readable."""
    return str(yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=10_000, explicit_start=True))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, _data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


# ---- the objects ----


def _meta(plan: Plan, **more: Any) -> Object:
    namespace = {"namespace": plan.options.namespace} if plan.options.namespace else {}
    return {"name": plan.name, **namespace, "labels": labels_of(plan.name), **more}


def _config_map(plan: Plan) -> Object:
    data = {SPEC_KEY: spec_text(plan.spec)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _meta(plan), "data": data}


def _service_account(plan: Plan) -> Object:
    annotations = {"annotations": dict(plan.options.identity)} if plan.options.identity else {}
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _meta(plan, **annotations),
        "automountServiceAccountToken": False,
    }


def _entrypoint(plan: Plan) -> str:
    """Plain words: shells on two machines read it. It says what the manifest decides, so that it can't disagree."""
    settings = {
        "workers.min": plan.min_ranks,
        "workers.max": plan.max_ranks,
        # `auto` would mean what the first pods to arrive have.
        "workers.gpus": int(plan.options.gpus > 0),
        "metrics.host": METRICS_HOST,
        "metrics.port": plan.spec.metrics.port,
    }
    return " ".join(["dltrain run", SPEC_FILE, *(f"{key}={value}" for key, value in settings.items())])


def _ray_job(plan: Plan) -> Object:
    options = plan.options
    metadata = _meta(plan)
    if options.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = options.queue
    if options.priority:
        metadata["labels"]["kueue.x-k8s.io/priority-class"] = options.priority
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "submissionMode": "K8sJobMode",
            "entrypoint": _entrypoint(plan),
            "shutdownAfterJobFinishes": True,
            # Each retry is a new cluster; the run goes on from its last checkpoint.
            "backoffLimit": options.num_retries,
            "activeDeadlineSeconds": int(options.deadline_hours * 3600),
            "preRunningDeadlineSeconds": int(options.start_minutes * 60),
            "rayClusterSpec": {
                "rayVersion": plan.ray_version,
                "authOptions": {"mode": "token"},
                "headGroupSpec": head_group(plan),
                "workerGroupSpecs": [worker_group(plan)],
            },
            "submitterPodTemplate": submitter(plan),
        },
    }


def _network_policy(plan: Plan) -> Object:
    """From outside only what is scraped, and the operator that asks for the job's state; inside everything."""
    operator = {"app.kubernetes.io/component": "kuberay-operator"}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _meta(plan),
        "spec": {
            "podSelector": {"matchLabels": labels_of(plan.name)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": labels_of(plan.name)}}]},
                {
                    "from": [{"namespaceSelector": {}}],
                    "ports": [{"protocol": "TCP", "port": port} for port in (DRIVER_PORT, *_RAY_METRICS)],
                },
                {
                    "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": operator}}],
                    "ports": [{"protocol": "TCP", "port": "dashboard"}],
                },
            ],
        },
    }


def _pod_monitor(plan: Plan) -> Object:
    return scraped(_meta(plan), labels_of(plan.name))


def scraped(metadata: Object, labels: Mapping[str, str]) -> Object:
    """A PodMonitor, for the Prometheus operator: what the driver and Ray serve on pods that have these labels."""
    dropped = {"sourceLabels": ["__name__"], "regex": "ray_(grpc|operation|gcs_storage)_.*", "action": "drop"}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        # What kube-prometheus-stack looks for.
        "metadata": {**metadata, "labels": {**metadata["labels"], "release": "prometheus"}},
        "spec": {
            "selector": {"matchLabels": dict(labels)},
            # Ray's dashboards, and the alert on jobs that export nothing, choose by ray_io_cluster.
            "podTargetLabels": ["ray.io/cluster"],
            "sampleLimit": _SAMPLE_LIMIT,
            "podMetricsEndpoints": [
                {"port": DRIVER_PORT, "interval": "15s"},
                *({"port": port, "interval": "30s", "metricRelabelings": [dropped]} for port in _RAY_METRICS),
            ],
        },
    }
