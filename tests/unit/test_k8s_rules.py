"""The rules over manifests: each is broken once, and must be what notices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from cluster.kustomize import OVERLAYS, SPEC
from dltrain.deploying.manifests import objects_of
from dltrain.deploying.options import Options, resolve
from dltrain.deploying.pods import capabilities_of
from dltrain.deploying.rules import RULES, check

OPTIONS = Options(image="registry/dltrain:1", workers=2, s3_secret="s3", ray_version="2.60.0")
Break = Callable[[dict[str, Any]], object]


def made(options: Options = OPTIONS) -> dict[str, Any]:
    """Kind -> object."""
    return {item["kind"]: copy.deepcopy(item) for item in objects_of(resolve(SPEC, options))}


def spec(objects: dict[str, Any]) -> dict[str, Any]:
    return objects["RayJob"]["spec"]


def cluster(objects: dict[str, Any]) -> dict[str, Any]:
    return spec(objects)["rayClusterSpec"]


def head(objects: dict[str, Any]) -> dict[str, Any]:
    return cluster(objects)["headGroupSpec"]


def workers(objects: dict[str, Any]) -> dict[str, Any]:
    return cluster(objects)["workerGroupSpecs"][0]


def pod(objects: dict[str, Any]) -> dict[str, Any]:
    return workers(objects)["template"]["spec"]


def main(objects: dict[str, Any]) -> dict[str, Any]:
    return pod(objects)["containers"][0]


def head_main(objects: dict[str, Any]) -> dict[str, Any]:
    return head(objects)["template"]["spec"]["containers"][0]


def labels(objects: dict[str, Any]) -> dict[str, Any]:
    return objects["RayJob"]["metadata"]["labels"]


def queued(objects: dict[str, Any]) -> dict[str, Any]:
    labels(objects)["kueue.x-k8s.io/queue-name"] = "training"
    return spec(objects)


def autoscaled(objects: dict[str, Any]) -> dict[str, Any]:
    cluster(objects)["enableInTreeAutoscaling"] = True
    return cluster(objects)


def env(container: dict[str, Any], name: str, value: str) -> None:
    container["env"].append({"name": name, "value": value})


def context(objects: dict[str, Any], **more: Any) -> None:
    main(objects)["securityContext"].update(more)


def rule(policy: str, seconds: int, **status: str) -> dict[str, Any]:
    return {"policy": policy, "condition": {"ttlSeconds": seconds, **(status or {"jobStatus": "FAILED"})}}


def ruled(objects: dict[str, Any], *rules: dict[str, Any]) -> None:
    spec(objects).update(shutdownAfterJobFinishes=False, deletionStrategy={"deletionRules": list(rules)})


def legacy(objects: dict[str, Any], success: str, failure: str) -> None:
    spec(objects)["deletionStrategy"] = {"onSuccess": {"policy": success}, "onFailure": {"policy": failure}}


def sidecar(objects: dict[str, Any]) -> None:
    spec(objects)["submissionMode"] = "SidecarMode"


def selected(objects: dict[str, Any], **more: Any) -> None:
    spec(objects).update({"clusterSelector": {"ray.io/cluster": "others"}, **more})


def topology(objects: dict[str, Any], **levels: str) -> None:
    workers(objects)["template"]["metadata"]["annotations"] = {
        f"kueue.x-k8s.io/podset-{kind}-topology": level for kind, level in levels.items()
    }


# Rule, what breaks it.
CASES: list[tuple[str, Break]] = [
    ("kuberay.name", lambda o: o["RayJob"]["metadata"].update(name="a" * 48)),
    ("kuberay.name", lambda o: o["RayJob"]["metadata"].update(name="3d-net")),
    ("kuberay.name", lambda o: o["RayJob"]["metadata"].update(name="a.b")),
    ("kuberay.mode", lambda o: spec(o).update(submissionMode="K8SJobMode")),
    ("kuberay.suspend", lambda o: spec(o).update(suspend=True, shutdownAfterJobFinishes=False)),
    ("kuberay.suspend", lambda o: selected(o, suspend=True)),
    ("kuberay.ttl", lambda o: spec(o).update(ttlSecondsAfterFinished=-1)),
    ("kuberay.ttl", lambda o: spec(o).update(ttlSecondsAfterFinished=60, shutdownAfterJobFinishes=False)),
    ("kuberay.cluster", lambda o: spec(o).pop("rayClusterSpec")),
    ("kuberay.cluster", lambda o: selected(o, backoffLimit=1)),
    ("kuberay.cluster", lambda o: selected(o, clusterSelector={"name": "x"}, backoffLimit=0)),
    ("kuberay.cluster", lambda o: selected(o, submissionMode="SidecarMode", backoffLimit=0)),
    ("kuberay.interactive", lambda o: spec(o).update(submissionMode="InteractiveMode")),
    ("kuberay.sidecar", sidecar),
    ("kuberay.sidecar", lambda o: (sidecar(o), head(o)["template"]["spec"].update(restartPolicy="Always"))),
    ("kuberay.numbers", lambda o: spec(o).update(activeDeadlineSeconds=0)),
    ("kuberay.numbers", lambda o: spec(o).update(preRunningDeadlineSeconds=-5)),
    ("kuberay.numbers", lambda o: spec(o).update(backoffLimit=-1)),
    ("kuberay.runtime-env", lambda o: spec(o).update(runtimeEnvYAML="env_vars: [")),
    ("kuberay.runtime-env", lambda o: spec(o).update(runtimeEnvYAML="working_dir")),
    ("kuberay.deletion", lambda o: spec(o).update(deletionStrategy={})),
    ("kuberay.deletion", lambda o: spec(o).update(deletionStrategy={"deletionRules": [rule("DeleteSelf", 0)]})),
    ("kuberay.deletion", lambda o: spec(o).update(deletionStrategy={"onSuccess": {"policy": "DeleteSelf"}})),
    ("kuberay.deletion", lambda o: legacy(o, "DeleteNone", "DeleteCluster")),
    ("kuberay.deletion", lambda o: (autoscaled(o), legacy(o, "DeleteWorkers", "DeleteCluster"))),
    ("kuberay.deletion-rules", lambda o: ruled(o, rule("DeleteCluster", 60), rule("DeleteWorkers", 120))),
    ("kuberay.deletion-rules", lambda o: ruled(o, rule("DeleteSelf", 0), rule("DeleteSelf", 0))),
    ("kuberay.deletion-rules", lambda o: ruled(o, rule("DeleteSelf", -1))),
    ("kuberay.deletion-rules", lambda o: ruled(o, rule("DeleteSelf", 0, jobStatus="X", jobDeploymentStatus="Y"))),
    ("kuberay.deletion-rules", lambda o: (autoscaled(o), ruled(o, rule("DeleteWorkers", 0)))),
    ("kuberay.containers", lambda o: pod(o).update(containers=[])),
    ("kuberay.containers", lambda o: cluster(o).pop("headGroupSpec")),
    ("kuberay.resources", lambda o: head(o)["rayStartParams"].update({"num-cpus": "0"})),
    ("kuberay.labels", lambda o: workers(o)["rayStartParams"].update(labels="zone=a")),
    ("kuberay.labels", lambda o: workers(o).update(labels={"zone": "a b"})),
    ("kuberay.labels", lambda o: workers(o).update(labels={"a/b/c": "x"})),
    ("kuberay.replicas", lambda o: workers(o).pop("maxReplicas")),
    ("kuberay.replicas", lambda o: workers(o).update(minReplicas=3)),
    ("kuberay.replicas", lambda o: workers(o).update(minReplicas=-1)),
    ("kuberay.needs-autoscaler", lambda o: workers(o).update(idleTimeoutSeconds=60)),
    ("kuberay.needs-autoscaler", lambda o: workers(o).update(priority=1)),
    ("kuberay.needs-autoscaler", lambda o: (autoscaled(o).update(rayVersion="2.55.0"), workers(o).update(priority=1))),
    ("kuberay.needs-autoscaler", lambda o: (autoscaled(o), workers(o).update(idleTimeoutSeconds=-1))),
    ("kuberay.autoscaler", lambda o: env(head_main(o), "RAY_enable_autoscaler_v2", "1")),
    ("kuberay.autoscaler", lambda o: (autoscaled(o), workers(o).update(suspend=True))),
    ("kuberay.autoscaler", lambda o: (autoscaled(o), pod(o).update(restartPolicy="Always"))),
    (
        "kuberay.autoscaler",
        lambda o: (
            autoscaled(o).update(autoscalerOptions={"version": "v2"}),
            env(head_main(o), "RAY_enable_autoscaler_v2", "1"),
        ),
    ),
    ("kuberay.gcs", lambda o: env(head_main(o), "RAY_REDIS_ADDRESS", "redis:6379")),
    ("kuberay.gcs", lambda o: head(o)["rayStartParams"].update({"redis-username": "ray"})),
    ("kuberay.gcs", lambda o: cluster(o).update(gcsFaultToleranceOptions={"backend": "rocksdb"})),
    (
        "kuberay.gcs",
        lambda o: (cluster(o).update(gcsFaultToleranceOptions={}), env(head_main(o), "REDIS_PASSWORD", "")),
    ),
    ("kuberay.auth", lambda o: cluster(o).update(rayVersion="2.51.0")),
    ("kuberay.auth", lambda o: cluster(o).pop("rayVersion")),
    ("kuberay.auth", lambda o: cluster(o)["authOptions"].update(enableK8sTokenAuth=True)),
    ("kuberay.gates", lambda o: cluster(o).update(networkPolicy={"mode": "DenyAll"})),
    ("kuberay.gates", lambda o: cluster(o).update(tlsOptions={})),
    ("kuberay.gates", lambda o: cluster(o).update(historyServerOptions={})),
    ("kuberay.upgrade", lambda o: cluster(o).update(upgradeStrategy={"type": "Recreate"})),
    ("kueue.names", lambda o: labels(o).update({"kueue.x-k8s.io/queue-name": "Training_"})),
    ("kueue.names", lambda o: labels(o).update({"kueue.x-k8s.io/priority-class": "high"})),
    ("kueue.cluster", lambda o: queued(o).update(shutdownAfterJobFinishes=False)),
    ("kueue.cluster", lambda o: (queued(o), selected(o, backoffLimit=0))),
    ("kueue.autoscaler", lambda o: (queued(o), autoscaled(o))),
    ("kueue.groups", lambda o: (queued(o), workers(o).update(groupName="head"))),
    ("kueue.groups", lambda o: (queued(o), cluster(o).update(workerGroupSpecs=[workers(o)] * 18))),
    ("kueue.topology", lambda o: topology(o, preferred="rack", required="rack")),
    ("kueue.topology", lambda o: topology(o, required="my rack")),
    ("kueue.topology", lambda o: topology(o, unconstrained="a b")),
    ("run.recovery", lambda o: spec(o).update(submissionMode="HTTPMode")),
    ("run.recovery", lambda o: spec(o).update(shutdownAfterJobFinishes=False)),
    ("run.recovery", lambda o: spec(o).pop("backoffLimit")),
    ("run.recovery", lambda o: spec(o).pop("preRunningDeadlineSeconds")),
    ("run.submitter", lambda o: spec(o).pop("submitterPodTemplate")),
    ("run.cluster", lambda o: cluster(o)["authOptions"].update(mode="disabled")),
    ("run.cluster", lambda o: cluster(o).update(rayVersion="2.60")),
    ("run.cluster", autoscaled),
    ("run.head", lambda o: head(o).pop("resources")),
    ("run.head", lambda o: spec(o).update(entrypointNumCpus=1)),
    ("run.head-ports", lambda o: head_main(o)["ports"].pop(1)),
    ("run.head-ports", lambda o: head_main(o)["ports"].pop()),
    ("run.fixed-size", lambda o: workers(o).update(minReplicas=1)),
    ("run.fixed-size", lambda o: workers(o).update(numOfHosts=2)),
    ("run.ray-first", lambda o: pod(o)["containers"].insert(0, {**copy.deepcopy(main(o)), "name": "log-shipper"})),
    ("run.entrypoint", lambda o: spec(o).update(entrypoint="python train.py")),
    ("run.entrypoint", lambda o: spec(o).update(entrypoint=spec(o)["entrypoint"] + " name=$(hostname)")),
    ("security.host-namespaces", lambda o: pod(o).update(hostNetwork=True)),
    ("security.privileged", lambda o: context(o, privileged=True)),
    ("security.capabilities", lambda o: context(o, capabilities={"drop": ["ALL"], "add": ["IPC_LOCK"]})),
    ("security.capabilities", lambda o: main(o)["securityContext"].pop("capabilities")),
    ("security.volumes", lambda o: pod(o)["volumes"].append({"name": "disk", "hostPath": {"path": "/data"}})),
    ("security.host-ports", lambda o: main(o).update(ports=[{"containerPort": 8080, "hostPort": 8080}])),
    ("security.apparmor", lambda o: context(o, appArmorProfile={"type": "Unconfined"})),
    ("security.selinux", lambda o: context(o, seLinuxOptions={"type": "spc_t"})),
    ("security.proc-mount", lambda o: context(o, procMount="Unmasked")),
    ("security.seccomp", lambda o: pod(o)["securityContext"].pop("seccompProfile")),
    ("security.seccomp", lambda o: context(o, seccompProfile={"type": "Unconfined"})),
    ("security.sysctls", lambda o: pod(o)["securityContext"].update(sysctls=[{"name": "kernel.msgmax", "value": "1"}])),
    ("security.escalation", lambda o: main(o)["securityContext"].pop("allowPrivilegeEscalation")),
    ("security.non-root", lambda o: pod(o)["securityContext"].pop("runAsNonRoot")),
    ("security.non-root", lambda o: context(o, runAsNonRoot=False)),
    ("security.run-as-user", lambda o: context(o, runAsUser=0)),
    ("security.host-process", lambda o: context(o, windowsOptions={"hostProcess": True})),
    ("security.probe-hosts", lambda o: main(o).update(livenessProbe={"tcpSocket": {"host": "10.0.0.1", "port": 1}})),
    ("security.seccomp", lambda o: spec(o)["submitterPodTemplate"]["spec"].pop("securityContext")),
    ("pod.qos", lambda o: main(o)["resources"]["requests"].update(memory="1Gi")),
    ("pod.qos", lambda o: main(o)["resources"].pop("limits")),
    ("pod.qos", lambda o: pod(o).update(initContainers=[{**copy.deepcopy(main(o)), "name": "a", "resources": {}}])),
    ("pod.shm", lambda o: main(o).update(volumeMounts=[])),
    ("pod.shm", lambda o: pod(o)["volumes"][0]["emptyDir"].pop("sizeLimit")),
    ("pod.shm", lambda o: pod(o)["volumes"][0]["emptyDir"].update(sizeLimit="64Gi")),
    ("pod.grace", lambda o: main(o).pop("lifecycle")),
    ("pod.grace", lambda o: pod(o).update(terminationGracePeriodSeconds=30)),
    ("pod.grace", lambda o: head_main(o)["env"].clear()),
    ("pod.secrets", lambda o: env(main(o), "AWS_SECRET_ACCESS_KEY", "abc")),
    ("pod.ports", lambda o: head_main(o)["ports"][0].update(name="dltrain-metrics-port")),
    ("pod.ports", lambda o: head_main(o)["ports"].append({"name": "again", "containerPort": 8265})),
    ("pod.mounts", lambda o: pod(o)["volumes"].clear()),
    ("pod.labels", lambda o: workers(o)["template"]["metadata"]["labels"].update(team="a b")),
    (
        "names.config-map",
        lambda o: o["ConfigMap"]["data"].update({"spec.yml": o["ConfigMap"]["data"].pop("spec.yaml")}),
    ),
    ("names.config-map", lambda o: o["ConfigMap"]["metadata"].update(name="other")),
    ("pod.labels", lambda o: pod(o).update(nodeSelector={"pool": "a b"})),
    ("pod.references", lambda o: main(o).update(image="")),
    ("pod.references", lambda o: main(o).update(envFrom=[{"secretRef": {"name": "My_Secret"}}])),
    ("pod.references", lambda o: pod(o).update(imagePullSecrets=[{"name": "a b"}])),
    ("names.namespace", lambda o: o["RayJob"]["metadata"].update(namespace="My_Namespace")),
    ("names.labels", lambda o: o["ServiceAccount"]["metadata"].update(annotations={"a b": "c"})),
    ("names.runs", lambda o: o["ConfigMap"]["data"].update({"spec.yaml": "runs: s3://elsewhere/runs\n"})),
    ("names.runs", lambda o: o["ConfigMap"]["data"].update({"spec.yaml": "runs: ./runs\n"})),
    ("names.service-account", lambda o: o["ServiceAccount"]["metadata"].update(name="other")),
    ("names.metrics-port", lambda o: head_main(o)["ports"][0].update(containerPort=9465)),
    ("names.metrics-port", lambda o: spec(o).update(entrypoint=spec(o)["entrypoint"].replace("0.0.0.0", "127.0.0.1"))),
    ("names.pod-monitor", lambda o: o["PodMonitor"]["spec"]["podMetricsEndpoints"].append({"port": "dltrain"})),
    ("names.pod-monitor", lambda o: o["PodMonitor"]["spec"].pop("sampleLimit")),
    ("names.pod-monitor", lambda o: o["PodMonitor"]["spec"].update(selector={"matchLabels": {"app": "ray"}})),
    ("names.network-policy", lambda o: o["NetworkPolicy"]["spec"].update(podSelector={"matchLabels": {"app": "ray"}})),
    ("names.network-policy", lambda o: o["NetworkPolicy"]["spec"].update(policyTypes=["Egress"])),
    ("names.network-policy", lambda o: o["NetworkPolicy"]["spec"]["ingress"][1].pop("ports")),
    ("names.network-policy", lambda o: o["NetworkPolicy"]["spec"]["ingress"][1]["ports"].append({"port": 6379})),
    ("names.network-policy", lambda o: o["NetworkPolicy"]["spec"]["ingress"][1]["ports"].pop(0)),
    ("names.network-policy", lambda o: o["NetworkPolicy"]["spec"]["ingress"].append({})),
    ("names.namespace", lambda o: o["ConfigMap"]["metadata"].update(namespace="other")),
    ("names.size", lambda o: o["ConfigMap"]["data"].update(notes="x" * 2**20)),
    ("names.labels", lambda o: o["ServiceAccount"]["metadata"]["labels"].update(team="a b")),
]


@pytest.mark.parametrize(("name", "broken"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_a_broken_rule_is_found(name: str, broken: Break) -> None:
    objects = made()
    broken(objects)
    found = check(list(objects.values()))
    assert name in {finding.rule for finding in found}
    assert all(finding.text and finding.path and "/" in finding.item for finding in found)


def test_every_rule_has_a_case() -> None:
    assert set(RULES) == {name for name, _ in CASES}


@pytest.mark.parametrize("options", [OPTIONS, *OVERLAYS.values()])
def test_what_is_made_breaks_none(options: Options) -> None:
    assert check(list(made(options).values()), capabilities_of(options)) == []


def test_rdma_is_what_restricted_refuses() -> None:
    found = check(list(made(OVERLAYS["rdma"]).values()))
    assert {(finding.rule, finding.path.split(".")[2]) for finding in found} == {
        ("security.capabilities", "workerGroupSpecs")
    }


@pytest.mark.parametrize("wrong", [{}, {"kind": "RayJob"}, {"kind": "RayJob", "spec": None}, {"kind": "NetworkPolicy"}])
def test_anything_may_be_looked_at(wrong: dict[str, Any]) -> None:
    check([wrong, {"kind": "PodMonitor"}, {"kind": "ConfigMap"}])


@pytest.mark.parametrize("spec", [{"rayClusterSpec": {"headGroupSpec": {}}}, {"rayClusterSpec": {}, "entrypoint": ""}])
def test_a_job_with_nothing_in_it_is_full_of_findings(spec: dict[str, Any]) -> None:
    rules = {finding.rule for finding in check([{"kind": "RayJob", "metadata": {}, "spec": spec}])}
    assert {"kuberay.name", "run.recovery", "run.submitter", "run.cluster", "run.head-ports"} <= rules
