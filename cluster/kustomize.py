"""The folder k8s/: a kustomize base and overlays, made by the code that `dltrain k8s` is made of.

    python -m cluster.kustomize k8s       # writes it anew
    kubectl kustomize k8s/overlays/gpu              # what `dltrain k8s --gpus-per-worker 8 ...` would print

An overlay is the base and a component, so that components can be combined. A component is the difference between the
manifests with an option and without it, as JSON patches: a strategic merge would replace whole lists of containers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.monitoring.kubernetes import objects as monitoring_objects
from dltrain import __version__
from dltrain.deploying.manifests import objects_of, spec_text, to_yaml
from dltrain.deploying.options import Options, resolve
from dltrain.deploying.pods import SPEC_KEY, Object, labels_of
from dltrain.spec import parse_spec

__all__ = ["BASE", "OVERLAYS", "SPEC", "files", "patch", "write"]

_HEADER = "# Written by `python -m cluster.kustomize k8s`: change that, or take your own copy.\n"
_FILES = {
    "ServiceAccount": "service-account.yaml",
    "NetworkPolicy": "network-policy.yaml",
    "PodMonitor": "pod-monitor.yaml",
    "RayJob": "ray-job.yaml",
}
_GROUPS = {"RayJob": {"group": "ray.io", "version": "v1"}, "ServiceAccount": {"version": "v1"}}
_MONITORING_PARTS = ("rules", "sidecar", "operator")
_QUEUE = "training"

SPEC = parse_spec(
    {
        "name": "image-cnn",
        "task": "jobs.image_cnn:ImageCnn",
        "args": {"width": 32, "blocks": 2},
        "data": {"train": "s3://bucket/digits/train", "eval": "s3://bucket/digits/test"},
        "batch": {"global": 64},
        "train": {"epochs": 16, "seed": 0, "best": {"metric": "accuracy", "mode": "max"}},
        "optim": {"name": "adamw", "lr": 0.004, "weight_decay": 0.05, "schedule": "cosine", "warmup": 20, "clip": 1.0},
        "engine": {"zero": 1, "precision": "bf16"},
        "workers": 2,
        "checkpoint": {"every": 100, "keep": 2},
        "runs": "s3://bucket/runs",
    }
)


BASE = Options(image=f"dltrain:{__version__}", workers=2, s3_secret="dltrain-s3")
_GPU: dict[str, Any] = {"gpus": 8, "cpus": 64, "memory": "512Gi", "shm": "64Gi"}
_RDMA: dict[str, Any] = {"rdma": {"rdma/hca": 1}, "env": {"NCCL_IB_HCA": "mlx5", "NCCL_SOCKET_IFNAME": "eth0"}}
_ROLE = {"eks.amazonaws.com/role-arn": "arn:aws:iam::111122223333:role/dltrain"}
# Overlay -> what `dltrain k8s` would have been told.
OVERLAYS = {
    "gpu": dataclasses.replace(BASE, **_GPU),
    "rdma": dataclasses.replace(BASE, **_GPU, **_RDMA),
    "spot": dataclasses.replace(BASE, spot=True),
    "kueue": dataclasses.replace(BASE, queue=_QUEUE),
    "s3-irsa": dataclasses.replace(BASE, s3_secret="", identity=_ROLE),
    "monitoring": BASE,
}
# RDMA is for pods that have GPUs.
_ON_TOP_OF = {"rdma": "gpu"}


def files(root: Path) -> dict[str, str]:
    """Every file of k8s/: its path under it, and its text.

    Args:
        root: of the project: the image is built with its constraints.txt, which names Ray's version.
    """
    version = _pinned(root / "constraints.txt", "ray")
    base = _objects(BASE, version)
    found = {f"base/{name}": text for name, text in _base(base)}
    for name, options in OVERLAYS.items():
        below = _ON_TOP_OF.get(name)
        before = _objects(OVERLAYS[below], version) if below else base
        component = dict(_component(before, _objects(options, version)))
        found |= {f"components/{name}/{file}": text for file, text in component.items()}
        found |= {f"overlays/{name}/{file}": text for file, text in _overlay(name, below, bool(component))}
    return found


def write(directory: Path, root: Path) -> None:
    """Writes k8s/; files that are no longer made go."""
    made = files(root)
    for path in directory.rglob("*.yaml"):
        # Of a directory that is not k8s/ nothing is lost.
        if str(path.relative_to(directory)) not in made and path.read_text().startswith(_HEADER):
            path.unlink()
    for name, text in made.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _pinned(constraints: Path, package: str) -> str:
    lines = (line.partition("==") for line in constraints.read_text().splitlines())
    return next(version.strip() for name, _, version in lines if name == package)


def _objects(options: Options, ray_version: str) -> dict[str, Object]:
    plan = resolve(SPEC, dataclasses.replace(options, ray_version=ray_version), "k8s/base/spec.yaml")
    return {item["kind"]: item for item in objects_of(plan)}


# ---- the parts ----


def _base(objects: Mapping[str, Object]) -> Iterator[tuple[str, str]]:
    name = objects["RayJob"]["metadata"]["name"]
    yield SPEC_KEY, spec_text(SPEC)
    for kind, file in _FILES.items():
        yield file, _HEADER + to_yaml([objects[kind]])
    generator = {
        "name": name,
        "files": [SPEC_KEY],
        # Names inside a RayJob are not followed, so the name must stay.
        "options": {"disableNameSuffixHash": True, "labels": labels_of(name)},
    }
    yield "kustomization.yaml", _kustomization(resources=list(_FILES.values()), configMapGenerator=[generator])


def _component(before: Mapping[str, Object], after: Mapping[str, Object]) -> Iterator[tuple[str, str]]:
    patches = []
    for kind, file in _FILES.items():
        if operations := patch(before[kind], after[kind]):
            target = {**_GROUPS[kind], "kind": kind, "labelSelector": "app.kubernetes.io/part-of=dltrain"}
            patches.append({"path": file, "target": target})
            yield file, _HEADER + to_yaml([operations])
    if patches:
        yield (
            "kustomization.yaml",
            _kustomization(apiVersion="kustomize.config.k8s.io/v1alpha1", kind="Component", patches=patches),
        )


def _overlay(name: str, below: str | None, has_component: bool) -> Iterator[tuple[str, str]]:
    more = {"kueue": ("queue.yaml", _queue()), "monitoring": ("monitoring.yaml", _monitoring())}
    resources = ["../../base"]
    file, objects = more.get(name, ("", []))
    if objects:
        resources.append(file)
        yield file, _HEADER + to_yaml(objects)
    fields = {"resources": resources}
    if has_component:
        fields["components"] = [f"../../components/{part}" for part in (below, name) if part]
    yield "kustomization.yaml", _kustomization(**fields)


def _kustomization(**fields: Any) -> str:
    return _HEADER + to_yaml([{"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **fields}])


def _queue() -> list[Object]:
    """A queue to begin with; where there is one already, its name goes into the RayJob's label."""
    api, flavor = "kueue.x-k8s.io/v1beta2", "default"
    quota = {"cpu": "160", "memory": "1200Gi", "nvidia.com/gpu": "16"}
    resources = [{"name": name, "nominalQuota": amount} for name, amount in quota.items()]
    spec = {
        "namespaceSelector": {},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [
            {"coveredResources": list(quota), "flavors": [{"name": flavor, "resources": resources}]},
        ],
    }
    return [
        {"apiVersion": api, "kind": "ResourceFlavor", "metadata": {"name": flavor}, "spec": {}},
        {"apiVersion": api, "kind": "ClusterQueue", "metadata": {"name": _QUEUE}, "spec": spec},
        {"apiVersion": api, "kind": "LocalQueue", "metadata": {"name": _QUEUE}, "spec": {"clusterQueue": _QUEUE}},
    ]


def _monitoring() -> list[Object]:
    """Rules and dashboards, in whatever namespace they are applied to; what is scraped is the base's PodMonitor's."""
    objects = monitoring_objects("default", _MONITORING_PARTS)
    for item in objects:
        del item["metadata"]["namespace"]
    return objects


def patch(before: Any, after: Any, path: str = "") -> list[Object]:
    """What makes `before` into `after`, as JSON patch (RFC 6902). What a list has more at its end is appended."""
    if isinstance(before, dict) and isinstance(after, dict):
        gone = [{"op": "remove", "path": f"{path}/{_escaped(key)}"} for key in before if key not in after]
        new = [
            {"op": "add", "path": f"{path}/{_escaped(key)}", "value": value}
            for key, value in after.items()
            if key not in before
        ]
        both = (patch(before[key], after[key], f"{path}/{_escaped(key)}") for key in before if key in after)
        return [*gone, *new, *(operation for operations in both for operation in operations)]
    if isinstance(before, list) and isinstance(after, list):
        if len(before) == len(after):
            both = (patch(old, value, f"{path}/{i}") for i, (old, value) in enumerate(zip(before, after, strict=True)))
            return [operation for operations in both for operation in operations]
        if after[: len(before)] == before:
            return [{"op": "add", "path": f"{path}/-", "value": value} for value in after[len(before) :]]
    return [] if before == after else [{"op": "replace", "path": path, "value": after}]


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(__file__).resolve().parents[1])
