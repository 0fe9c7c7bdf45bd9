"""What a run needs of its RayJob, and what its objects must agree on.

for path, text in RUN["run.recovery"](job): ...
for kind_and_name, path, text in TOGETHER["names.config-map"](objects): ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import yaml

from dltrain.deploying.looking import (
    CLUSTER,
    Fault,
    JobRule,
    Object,
    Pod,
    at,
    env_of,
    groups_of,
    is_dns_label,
    is_qualified,
    items,
    label_faults,
    pods_of,
    version_of,
)
from dltrain.deploying.options import RAY_PORTS

__all__ = ["RUN", "TOGETHER", "TogetherRule", "name_of"]

# Object, where in it, and what is wrong there.
TogetherFault = tuple[str, str, str]
TogetherRule = Callable[[Sequence[Object]], Iterator[TogetherFault]]

_DRIVER_PORT = "dltrain-metrics"
# etcd takes no more in one object.
_MOST_BYTES = 2**20


# ---- of the RayJob ----


def _recovery(job: Object) -> Iterator[Fault]:
    spec = at(job, "spec") or {}
    if spec.get("submissionMode") != "K8sJobMode":
        yield "spec.submissionMode", f"found {spec.get('submissionMode')!r}; a run is submitted by K8sJobMode"
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield "spec.shutdownAfterJobFinishes", "must be true: machines that train nothing are given back"
    for key in ("backoffLimit", "activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key) is None:
            yield f"spec.{key}", "must be set: retries and deadlines are what ends a job that nobody looks at"


def _submitter(job: Object) -> Iterator[Fault]:
    if at(job, "spec", "submitterPodTemplate") is None:
        yield "spec.submitterPodTemplate", "must be set: KubeRay's own has no securityContext, `restricted` refuses it"


def _cluster(job: Object) -> Iterator[Fault]:
    if at(job, "spec", "rayClusterSpec", "authOptions", "mode") != "token":
        yield f"{CLUSTER}.authOptions.mode", "must be token: whoever reaches the dashboard may run code"
    if version_of(at(job, "spec", "rayClusterSpec", "rayVersion")) is None:
        yield f"{CLUSTER}.rayVersion", "must be exact, such as 2.60.0: probes and token depend on it"
    if at(job, "spec", "rayClusterSpec", "enableInTreeAutoscaling"):
        yield f"{CLUSTER}.enableInTreeAutoscaling", "must not be set: every rank takes part in every step"


def _head(job: Object) -> Iterator[Fault]:
    resources = at(job, "spec", "rayClusterSpec", "headGroupSpec", "resources") or {}
    if str(resources.get("CPU")) != "0":
        yield f"{CLUSTER}.headGroupSpec.resources", "needs CPU: '0', or ranks are placed beside the driver"
    for key in ("entrypointNumCpus", "entrypointNumGpus", "entrypointResources"):
        if at(job, "spec", key):
            yield f"spec.{key}", "must not be set: the driver would leave the head, where its metrics port is declared"


def _head_ports(job: Object) -> Iterator[Fault]:
    """The head's service has the ports that its container declares, or all the usual ones when it declares none."""
    main = next((pod.main() for pod in pods_of(job) if pod.role == "head"), {})
    declared = {at(port, "name"): at(port, "containerPort") for port in items(main, "ports")}
    for name in ("gcs-server", "dashboard", "client", "as-metrics", "dash-metrics"):
        if declared.get(name) != RAY_PORTS[name]:
            yield (
                f"{CLUSTER}.headGroupSpec.template.spec.containers.0.ports",
                f"needs {name}: {RAY_PORTS[name]}; a service of the head has only what is declared here",
            )


def _fixed_size(job: Object) -> Iterator[Fault]:
    for _, path, group in groups_of(job):
        sizes = [at(group, key) for key in ("replicas", "minReplicas", "maxReplicas")]
        if "workerGroupSpecs" in path and len(set(sizes)) > 1:
            yield path, f"found replicas, minReplicas and maxReplicas of {sizes}; they must be equal"
        if (at(group, "numOfHosts") or 1) != 1:
            yield f"{path}.numOfHosts", "must be 1: more is for slices of TPUs"


def _ray_first(job: Object) -> Iterator[Fault]:
    for pod in pods_of(job):
        name = str(at(pod.main(), "name"))
        if not name.startswith("ray-"):
            yield f"{pod.path}.spec.containers.0", f"found {name!r}; the first container is the one Ray is started in"


def _entrypoint(job: Object) -> Iterator[Fault]:
    words = _words(job)
    if words[:2] != ["dltrain", "run"]:
        yield "spec.entrypoint", "must begin with `dltrain run`"
    for word in words:
        if not re.fullmatch(r"[A-Za-z0-9_./:=@%+,-]+", word):
            yield "spec.entrypoint", f"found {word!r}; shells on two machines read it, so it must be plain words"


def _words(job: Object) -> list[str]:
    return str(at(job, "spec", "entrypoint") or "").split()


RUN: dict[str, JobRule] = {
    "run.recovery": _recovery,
    "run.submitter": _submitter,
    "run.cluster": _cluster,
    "run.head": _head,
    "run.head-ports": _head_ports,
    "run.fixed-size": _fixed_size,
    "run.ray-first": _ray_first,
    "run.entrypoint": _entrypoint,
}


# ---- of all objects together ----


def name_of(item: Object) -> str:
    """Kind and name."""
    return f"{at(item, 'kind')}/{at(item, 'metadata', 'name')}"


def _of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    return [item for item in objects if at(item, "kind") == kind]


def _pods(objects: Sequence[Object]) -> Iterator[tuple[Object, Pod]]:
    for job in _of_kind(objects, "RayJob"):
        yield from ((job, pod) for pod in pods_of(job))


def _config_map(objects: Sequence[Object]) -> Iterator[TogetherFault]:
    """The file that the entrypoint reads is there, from a ConfigMap of these."""
    maps = {at(item, "metadata", "name"): at(item, "data") or {} for item in _of_kind(objects, "ConfigMap")}
    for job, pod in _pods(objects):
        if pod.role != "head":
            continue
        file = next(iter(_words(job)[2:]), "")
        found = _mounted(pod, file.rpartition("/")[0], maps)
        if found is None or file.rpartition("/")[2] not in found:
            yield name_of(job), pod.path, f"{file!r} of the entrypoint is not in a ConfigMap that is mounted there"


def _mounted(pod: Pod, directory: str, maps: Any) -> Any:
    names = [at(m, "name") for m in items(pod.main(), "volumeMounts") if at(m, "mountPath") == directory]
    sources = [at(v, "configMap", "name") for v in items(pod.spec, "volumes") if at(v, "name") in names]
    return maps.get(sources[0]) if sources else None


def _specs(objects: Sequence[Object]) -> Iterator[tuple[Object, Any]]:
    """Each RayJob with the spec that it runs, as far as there is one."""
    maps = {at(item, "metadata", "name"): at(item, "data") or {} for item in _of_kind(objects, "ConfigMap")}
    for job, pod in _pods(objects):
        directory, _, key = next(iter(_words(job)[2:]), "").rpartition("/")
        text = (_mounted(pod, directory, maps) or {}).get(key) if pod.role == "head" else None
        if text is not None:
            yield job, yaml.safe_load(text)


def _runs(objects: Sequence[Object]) -> Iterator[TogetherFault]:
    heads = {name_of(job): env_of(pod.main()) for job, pod in _pods(objects) if pod.role == "head"}
    for job, spec in _specs(objects):
        runs, known = at(spec, "runs") or "./runs", heads[name_of(job)].get("DLTRAIN_RUNS")
        if urlsplit(runs).scheme in ("", "file", "local", "memory"):
            yield name_of(job), "spec", f"the spec's runs is {runs!r}; a retry has none of the old pods' disks"
        if known != runs:
            yield name_of(job), "spec", f"DLTRAIN_RUNS of the head is {known!r}, the spec's runs {runs!r}"


def _service_account(objects: Sequence[Object]) -> Iterator[TogetherFault]:
    known = {at(item, "metadata", "name") for item in _of_kind(objects, "ServiceAccount")}
    for job, pod in _pods(objects):
        name = at(pod.spec, "serviceAccountName")
        if name not in known:
            yield name_of(job), f"{pod.path}.spec.serviceAccountName", f"found {name!r}; there is no such object here"


def _metrics_port(objects: Sequence[Object]) -> Iterator[TogetherFault]:
    for job, pod in _pods(objects):
        if pod.role != "head":
            continue
        settings = dict(word.split("=", 1) for word in _words(job) if "=" in word)
        declared = {at(port, "name"): str(at(port, "containerPort")) for port in items(pod.main(), "ports")}
        if declared.get(_DRIVER_PORT) is None or declared[_DRIVER_PORT] != settings.get("metrics.port"):
            yield (
                name_of(job),
                pod.path,
                f"declares {_DRIVER_PORT} {declared.get(_DRIVER_PORT)}, but the entrypoint has metrics.port="
                f"{settings.get('metrics.port')}",
            )
        if settings.get("metrics.host") != "0.0.0.0":
            yield name_of(job), "spec.entrypoint", "needs metrics.host=0.0.0.0, or nobody can scrape the driver"


def _selects(selector: Any, pod: Pod) -> bool:
    wanted = at(selector, "matchLabels") or {}
    return bool(wanted) and wanted.items() <= (at(pod.template, "metadata", "labels") or {}).items()


def _pod_monitor(objects: Sequence[Object]) -> Iterator[TogetherFault]:
    for monitor in _of_kind(objects, "PodMonitor"):
        pods = [pod for _, pod in _pods(objects) if _selects(at(monitor, "spec", "selector"), pod)]
        if not any(pod.role == "head" for pod in pods):
            yield name_of(monitor), "spec.selector", "selects no head of these jobs"
        declared = _port_names(pods)
        for endpoint in items(monitor, "spec", "podMetricsEndpoints"):
            if at(endpoint, "port") not in declared:
                yield name_of(monitor), "spec.podMetricsEndpoints", f"no pod declares {at(endpoint, 'port')!r}"
        if at(monitor, "spec", "sampleLimit") is None:
            yield name_of(monitor), "spec.sampleLimit", "must be set: a runaway must not take Prometheus with it"


def _port_names(pods: Sequence[Pod]) -> set[Any]:
    return {at(port, "name") for pod in pods for port in items(pod.main(), "ports")}


def _network_policy(objects: Sequence[Object]) -> Iterator[TogetherFault]:
    """Every pod is covered, what comes from outside has named ports, and those are what is scraped."""
    policies = _of_kind(objects, "NetworkPolicy")
    for job, pod in _pods(objects):
        covering = [policy for policy in policies if _selects(at(policy, "spec", "podSelector"), pod)]
        if not any("Ingress" in items(policy, "spec", "policyTypes") for policy in covering):
            yield name_of(job), pod.path, "no NetworkPolicy covers it: Ray's ports would be open to the whole cluster"
    scraped = {
        at(endpoint, "port")
        for monitor in _of_kind(objects, "PodMonitor")
        for endpoint in items(monitor, "spec", "podMetricsEndpoints")
    }
    for policy in policies:
        yield from _openings(policy, scraped)


def _openings(policy: Object, scraped: set[Any]) -> Iterator[TogetherFault]:
    own, open_ports = at(policy, "spec", "podSelector"), set()
    for i, rule in enumerate(items(policy, "spec", "ingress")):
        inside = [source for source in items(rule, "from") if source == {"podSelector": own}]
        if inside and len(inside) == len(items(rule, "from")):
            continue
        ports = {at(port, "port") for port in items(rule, "ports")}
        open_ports |= ports
        unnamed = [port for port in ports if not isinstance(port, str)]
        if not ports or unnamed:
            yield name_of(policy), f"spec.ingress.{i}", f"lets in what has no name: {unnamed or 'every port'}"
    for port in sorted(map(str, scraped - open_ports)):
        yield name_of(policy), "spec.ingress", f"does not let Prometheus reach {port}"


def _namespace(objects: Sequence[Object]) -> Iterator[TogetherFault]:
    """What a job refers to is in its namespace."""
    for job in _of_kind(objects, "RayJob"):
        namespace, name = (at(job, "metadata", key) for key in ("namespace", "name"))
        if namespace is not None and not is_dns_label(namespace, first="[a-z0-9]"):
            yield name_of(job), "metadata.namespace", f"found {namespace!r}, which no namespace may be called"
        for item in objects:
            own, kin = at(item, "metadata", "namespace"), at(item, "metadata", "labels", "app.kubernetes.io/instance")
            if kin == name and own != namespace:
                yield name_of(item), "metadata.namespace", f"found {own!r}, not that of {name_of(job)}"


def _size(objects: Sequence[Object]) -> Iterator[TogetherFault]:
    for item in _of_kind(objects, "ConfigMap"):
        size = sum(len(str(text).encode()) for text in (at(item, "data") or {}).values())
        if size > _MOST_BYTES:
            yield name_of(item), "data", f"has {size:,} bytes; an object has at most {_MOST_BYTES:,}"


def _metadata_labels(objects: Sequence[Object]) -> Iterator[TogetherFault]:
    for item in objects:
        for path, text in label_faults("metadata.labels", at(item, "metadata", "labels")):
            yield name_of(item), path, text
        for key in at(item, "metadata", "annotations") or {}:
            if not is_qualified(key):
                yield name_of(item), "metadata.annotations", f"found the key {key!r}, which no annotation may have"


TOGETHER: dict[str, TogetherRule] = {
    "names.config-map": _config_map,
    "names.runs": _runs,
    "names.service-account": _service_account,
    "names.metrics-port": _metrics_port,
    "names.pod-monitor": _pod_monitor,
    "names.network-policy": _network_policy,
    "names.namespace": _namespace,
    "names.size": _size,
    "names.labels": _metadata_labels,
}
