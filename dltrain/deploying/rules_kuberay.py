"""What KubeRay's operator (1.7) and Kueue (0.19) refuse, and no schema says: rules over a RayJob.

    for path, text in KUBERAY["kuberay.name"](job): ...

A RayJob that breaks one is accepted by the API server and then fails, or stands still for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from dltrain.deploying.looking import (
    CLUSTER,
    Fault,
    JobRule,
    Object,
    at,
    env_of,
    groups_of,
    is_dns_label,
    is_label,
    is_object_name,
    is_qualified,
    items,
    label_faults,
    version_of,
)
from dltrain.deploying.options import NAME_LENGTH

__all__ = ["KUBERAY", "KUEUE"]

_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_AUTOSCALER_ENV = "RAY_enable_autoscaler_v2"
_QUEUE = "kueue.x-k8s.io/queue-name"
_PRIORITY = "kueue.x-k8s.io/priority-class"
_TOPOLOGY = ("required", "preferred", "unconstrained")
# A Workload has at most 18 sets of pods, and the head is one.
_MOST_GROUPS = 17


def _spec(job: Object) -> Object:
    found: Object = at(job, "spec") or {}
    return found


def _cluster(job: Object) -> Object:
    found: Object = at(job, "spec", "rayClusterSpec") or {}
    return found


def _head_env(job: Object) -> dict[str, Any]:
    return env_of(at(_cluster(job), "headGroupSpec", "template", "spec", "containers", 0) or {})


def _autoscales(job: Object) -> bool:
    return bool(at(_cluster(job), "enableInTreeAutoscaling"))


def _autoscales_v2(job: Object) -> bool:
    if not _autoscales(job):
        return False
    asked = at(_cluster(job), "autoscalerOptions", "version")
    # Since Ray 2.47 it is the one that is taken.
    return bool(asked == "v2") if asked else (version_of(at(_cluster(job), "rayVersion")) or (0, 0, 0)) >= (2, 47, 0)


def _workers(job: Object) -> Iterator[tuple[str, str, Object]]:
    return (group for group in groups_of(job) if group[1] != f"{CLUSTER}.headGroupSpec")


# ---- the job ----


def _name(job: Object) -> Iterator[Fault]:
    name = at(job, "metadata", "name")
    if not is_dns_label(name, NAME_LENGTH):
        yield "metadata.name", f"found {name!r}; it must be 1-47 of a-z, 0-9 and -, beginning with a letter"


def _mode(job: Object) -> Iterator[Fault]:
    mode = _spec(job).get("submissionMode", _MODES[0])
    if mode not in _MODES:
        yield "spec.submissionMode", f"found {mode!r}; allowed: {', '.join(_MODES)} (the API server takes any word)"


def _suspend(job: Object) -> Iterator[Fault]:
    spec = _spec(job)
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "spec.suspend", "only a job with shutdownAfterJobFinishes: true can be suspended"
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield "spec.suspend", "a job on somebody else's cluster (clusterSelector) can't be suspended"


def _ttl(job: Object) -> Iterator[Fault]:
    ttl = _spec(job).get("ttlSecondsAfterFinished", 0)
    if ttl < 0:
        yield "spec.ttlSecondsAfterFinished", f"found {ttl}; it must be >= 0"
    if ttl > 0 and not _spec(job).get("shutdownAfterJobFinishes"):
        yield "spec.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true"


def _one_cluster(job: Object) -> Iterator[Fault]:
    spec = _spec(job)
    selector = spec.get("clusterSelector")
    if not selector and not spec.get("rayClusterSpec"):
        yield "spec", "has neither rayClusterSpec nor clusterSelector; one says where the job runs"
    if not selector:
        return
    if not selector.get("ray.io/cluster"):
        yield "spec.clusterSelector", "has no ray.io/cluster, the name of the cluster"
    if spec.get("submissionMode") == "SidecarMode":
        yield "spec.clusterSelector", "does not go with SidecarMode"
    if (spec.get("backoffLimit") or 0) > 0:
        yield "spec.clusterSelector", "does not go with backoffLimit: a retry makes a cluster anew"


def _interactive(job: Object) -> Iterator[Fault]:
    if _spec(job).get("submissionMode") == "InteractiveMode" and (_spec(job).get("backoffLimit") or 0) > 0:
        yield "spec.backoffLimit", "does not go with InteractiveMode"


def _sidecar(job: Object) -> Iterator[Fault]:
    if _spec(job).get("submissionMode") != "SidecarMode":
        return
    for key in ("submitterPodTemplate", "submitterConfig"):
        if _spec(job).get(key) is not None:
            yield f"spec.{key}", "does not go with SidecarMode"
    if at(_cluster(job), "headGroupSpec", "template", "spec", "restartPolicy") not in (None, "", "Never"):
        yield f"{CLUSTER}.headGroupSpec.template.spec.restartPolicy", "must be Never with SidecarMode"


def _numbers(job: Object) -> Iterator[Fault]:
    for key, least in (("activeDeadlineSeconds", 1), ("preRunningDeadlineSeconds", 1), ("backoffLimit", 0)):
        number = _spec(job).get(key)
        if number is not None and number < least:
            yield f"spec.{key}", f"found {number}; it must be >= {least}"


def _runtime_env(job: Object) -> Iterator[Fault]:
    try:
        found = yaml.safe_load(_spec(job).get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        yield "spec.runtimeEnvYAML", "is not YAML of a mapping"


# ---- what becomes of the cluster ----


def _deletion(job: Object) -> Iterator[Fault]:
    strategy, path = _spec(job).get("deletionStrategy"), "spec.deletionStrategy"
    if strategy is None:
        return
    rules, legacy = strategy.get("deletionRules"), {"onSuccess", "onFailure"} & set(strategy)
    if rules and _spec(job).get("shutdownAfterJobFinishes"):
        yield f"{path}.deletionRules", "excludes shutdownAfterJobFinishes: true"
    if rules and legacy:
        yield path, "has deletionRules beside onSuccess and onFailure; give one of them"
    if not rules and len(legacy) < 2:
        yield path, "needs deletionRules, or both onSuccess and onFailure"
    if legacy and not rules:
        yield from _legacy_deletion(job, strategy, path)


def _legacy_deletion(job: Object, strategy: Object, path: str) -> Iterator[Fault]:
    for when in ("onSuccess", "onFailure"):
        policy = at(strategy, when, "policy")
        if policy is None:
            yield f"{path}.{when}", "has no policy"
        if policy == "DeleteWorkers" and _autoscales(job):
            yield f"{path}.{when}", "DeleteWorkers does not go with the autoscaler"
        if policy == "DeleteNone" and _spec(job).get("shutdownAfterJobFinishes"):
            yield f"{path}.{when}", "DeleteNone does not go with shutdownAfterJobFinishes: true"
        if policy in ("DeleteWorkers", "DeleteCluster") and _spec(job).get("clusterSelector"):
            yield f"{path}.{when}", f"{policy} does not go with clusterSelector"


def _deletion_rules(job: Object) -> Iterator[Fault]:
    path = "spec.deletionStrategy.deletionRules"
    seen: dict[tuple[Any, Any], dict[str, int]] = {}
    for i, rule in enumerate(items(job, "spec", "deletionStrategy", "deletionRules")):
        condition, policy = at(rule, "condition") or {}, str(at(rule, "policy"))
        status = (condition.get("jobStatus"), condition.get("jobDeploymentStatus"))
        seconds = condition.get("ttlSeconds", 0)
        if (status[0] is None) == (status[1] is None):
            yield f"{path}.{i}", "needs exactly one of jobStatus and jobDeploymentStatus"
        if seconds < 0:
            yield f"{path}.{i}", f"found ttlSeconds {seconds}; it must be >= 0"
        if policy == "DeleteWorkers" and _autoscales(job):
            yield f"{path}.{i}", "DeleteWorkers does not go with the autoscaler"
        if policy in seen.setdefault(status, {}):
            yield f"{path}.{i}", f"is a second {policy} for the same status"
        seen[status][policy] = seconds
    for ttls in seen.values():
        order = [ttls[policy] for policy in _DELETION_ORDER if policy in ttls]
        if order != sorted(order):
            yield path, f"workers go first, then the cluster, then the job itself; found ttlSeconds {order}"


# ---- the cluster ----


def _containers(job: Object) -> Iterator[Fault]:
    if _cluster(job) and at(_cluster(job), "headGroupSpec") is None:
        yield CLUSTER, "has no headGroupSpec"
    for _, path, group in groups_of(job):
        if not items(group, "template", "spec", "containers"):
            yield f"{path}.template.spec.containers", "is empty; the first container is Ray's"


def _resources(job: Object) -> Iterator[Fault]:
    for _, path, group in groups_of(job):
        twice = {"num-cpus", "num-gpus", "memory", "resources"} & set(at(group, "rayStartParams") or {})
        if twice and at(group, "resources"):
            yield f"{path}.resources", f"does not go with rayStartParams {', '.join(sorted(twice))}; give one of them"


def _labels(job: Object) -> Iterator[Fault]:
    for _, path, group in groups_of(job):
        if "labels" in (at(group, "rayStartParams") or {}):
            yield f"{path}.rayStartParams.labels", f"is refused; write them under {path}.labels"
        yield from label_faults(f"{path}.labels", at(group, "labels"))


def _replicas(job: Object) -> Iterator[Fault]:
    for _, path, group in _workers(job):
        least, most = at(group, "minReplicas"), at(group, "maxReplicas")
        if not _autoscales(job) and (least is None or most is None):
            yield path, "needs both minReplicas and maxReplicas, for nothing scales it"
        for key, number in (("minReplicas", least), ("maxReplicas", most)):
            if number is not None and number < 0:
                yield f"{path}.{key}", f"found {number}; it must be >= 0"
        if least is not None and most is not None and least > most:
            yield f"{path}.minReplicas", f"{least} is more than maxReplicas {most}"


def _needs_autoscaler(job: Object) -> Iterator[Fault]:
    asked = str(_head_env(job).get(_AUTOSCALER_ENV)).lower() in ("1", "true")
    for _, path, group in _workers(job):
        for key in ("idleTimeoutSeconds", "priority"):
            number = at(group, key)
            if number and not _autoscales_v2(job) and not asked:
                yield f"{path}.{key}", "needs the autoscaler's version 2"
        if (at(group, "idleTimeoutSeconds") or 0) < 0:
            yield f"{path}.idleTimeoutSeconds", "must be >= 0"
        if at(group, "priority") and (version_of(at(_cluster(job), "rayVersion")) or (0, 0, 0)) < (2, 56, 0):
            yield f"{path}.priority", "needs rayVersion 2.56.0 or later"


def _autoscaler(job: Object) -> Iterator[Fault]:
    env, version = _head_env(job), at(_cluster(job), "autoscalerOptions", "version")
    if not _autoscales(job):
        if str(env.get(_AUTOSCALER_ENV)) in ("1", "true"):
            yield CLUSTER, f"{_AUTOSCALER_ENV} needs enableInTreeAutoscaling: true"
        return
    if version and _AUTOSCALER_ENV in env:
        yield f"{CLUSTER}.autoscalerOptions.version", f"does not go with {_AUTOSCALER_ENV}; give the former"
    for _, path, group in groups_of(job):
        # Of the head there is no such field.
        if at(group, "suspend"):
            yield f"{path}.suspend", "does not go with the autoscaler"
        if _autoscales_v2(job) and at(group, "template", "spec", "restartPolicy") not in (None, "", "Never"):
            yield f"{path}.template.spec.restartPolicy", "must be Never with the autoscaler's version 2"


def _gcs(job: Object) -> Iterator[Fault]:
    options, env = at(_cluster(job), "gcsFaultToleranceOptions"), _head_env(job)
    params = at(_cluster(job), "headGroupSpec", "rayStartParams") or {}
    annotations = at(job, "metadata", "annotations") or {}
    path = f"{CLUSTER}.gcsFaultToleranceOptions"
    if options is None and "RAY_REDIS_ADDRESS" in env and annotations.get("ray.io/ft-enabled") != "true":
        yield CLUSTER, "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions"
    if params.get("redis-username") or "REDIS_USERNAME" in env:
        yield CLUSTER, "the redis user belongs into gcsFaultToleranceOptions.redisUsername"
    if options is None:
        return
    if annotations.get("ray.io/ft-enabled"):
        yield path, "does not go with the annotation ray.io/ft-enabled"
    if annotations.get("ray.io/external-storage-namespace"):
        yield path, "does not go with the annotation ray.io/external-storage-namespace"
    for name in sorted({"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & set(env)):
        yield path, f"does not go with {name} in the head's env"
    if params.get("redis-password"):
        yield path, "does not go with rayStartParams redis-password"
    if options.get("backend") == "rocksdb":
        yield f"{path}.backend", "rocksdb is behind a feature gate that is off"


def _auth(job: Object) -> Iterator[Fault]:
    options, path = at(_cluster(job), "authOptions") or {}, f"{CLUSTER}.authOptions"
    if options.get("enableK8sTokenAuth"):
        yield f"{path}.enableK8sTokenAuth", "is refused for a RayJob"
    if options.get("mode") != "token":
        return
    version = at(_cluster(job), "rayVersion")
    if (version_of(version) or (0, 0, 0)) < (2, 52, 0):
        yield f"{CLUSTER}.rayVersion", f"found {version!r}; authOptions.mode token needs 2.52.0 or later"


def _gates(job: Object) -> Iterator[Fault]:
    for key in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        if at(_cluster(job), key) is not None:
            yield f"{CLUSTER}.{key}", "is behind a feature gate that is off: the whole job would be refused"


def _upgrade(job: Object) -> Iterator[Fault]:
    if at(_cluster(job), "upgradeStrategy", "type") is not None:
        yield f"{CLUSTER}.upgradeStrategy", "is refused in a cluster that a RayJob makes"


KUBERAY: dict[str, JobRule] = {
    "kuberay.name": _name,
    "kuberay.mode": _mode,
    "kuberay.suspend": _suspend,
    "kuberay.ttl": _ttl,
    "kuberay.cluster": _one_cluster,
    "kuberay.interactive": _interactive,
    "kuberay.sidecar": _sidecar,
    "kuberay.numbers": _numbers,
    "kuberay.runtime-env": _runtime_env,
    "kuberay.deletion": _deletion,
    "kuberay.deletion-rules": _deletion_rules,
    "kuberay.containers": _containers,
    "kuberay.resources": _resources,
    "kuberay.labels": _labels,
    "kuberay.replicas": _replicas,
    "kuberay.needs-autoscaler": _needs_autoscaler,
    "kuberay.autoscaler": _autoscaler,
    "kuberay.gcs": _gcs,
    "kuberay.auth": _auth,
    "kuberay.gates": _gates,
    "kuberay.upgrade": _upgrade,
}


# ---- Kueue: only of jobs that name a queue ----


def _queue(job: Object) -> Any:
    return at(job, "metadata", "labels", _QUEUE)


def _kueue_names(job: Object) -> Iterator[Fault]:
    labels = at(job, "metadata", "labels") or {}
    for key in (_QUEUE, _PRIORITY):
        if key in labels and not is_object_name(labels[key]):
            yield f"metadata.labels.{key}", f"found {labels[key]!r}, which no object may be called"
    if _PRIORITY in labels and _QUEUE not in labels:
        yield f"metadata.labels.{_PRIORITY}", f"has no effect without {_QUEUE}"


def _kueue_cluster(job: Object) -> Iterator[Fault]:
    spec = _spec(job)
    if not _queue(job):
        return
    if spec.get("clusterSelector") and spec.get("rayClusterSpec"):
        yield "spec.clusterSelector", "a queued job makes its own cluster"
    if not spec.get("clusterSelector") and not spec.get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes", "must be true: a cluster that stays keeps the queue's quota"


def _kueue_autoscaler(job: Object) -> Iterator[Fault]:
    elastic = at(job, "metadata", "annotations", "kueue.x-k8s.io/elastic-job") == "true"
    if _queue(job) and _autoscales(job) and not elastic:
        yield f"{CLUSTER}.enableInTreeAutoscaling", "needs the annotation kueue.x-k8s.io/elastic-job: 'true'"


def _kueue_groups(job: Object) -> Iterator[Fault]:
    if not _queue(job):
        return
    groups = items(_cluster(job), "workerGroupSpecs")
    if len(groups) > _MOST_GROUPS:
        yield f"{CLUSTER}.workerGroupSpecs", f"found {len(groups)} groups; a Workload has room for {_MOST_GROUPS}"
    for i, group in enumerate(groups):
        if at(group, "groupName") == "head":
            yield f"{CLUSTER}.workerGroupSpecs.{i}.groupName", "the name head is the head's own"


def _kueue_topology(job: Object) -> Iterator[Fault]:
    for _, path, group in groups_of(job):
        annotations = at(group, "template", "metadata", "annotations") or {}
        found = {key: annotations.get(f"kueue.x-k8s.io/podset-{key}-topology") for key in _TOPOLOGY}
        given = [key for key, level in found.items() if level is not None]
        where = f"{path}.template.metadata.annotations"
        if len(given) > 1:
            yield where, f"found {' and '.join(given)} topology; a group has one"
        for key in given:
            if key != "unconstrained" and not is_qualified(found[key]):
                yield where, f"found {found[key]!r}; a level of the topology is a node label's key"
            if key == "unconstrained" and not is_label(found[key]):
                yield where, f"found {found[key]!r}; write 'true'"


KUEUE: dict[str, JobRule] = {
    "kueue.names": _kueue_names,
    "kueue.cluster": _kueue_cluster,
    "kueue.autoscaler": _kueue_autoscaler,
    "kueue.groups": _kueue_groups,
    "kueue.topology": _kueue_topology,
}
