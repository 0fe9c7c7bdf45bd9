"""How the rules look at manifests: nothing is taken for granted, for what they look at may be anybody's.

at(job, "spec", "rayClusterSpec", "rayVersion")     # None where there is none
for pod in pods_of(job): pod.role, pod.path, pod.spec
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Fault",
    "JobRule",
    "Object",
    "Pod",
    "PodRule",
    "at",
    "env_of",
    "groups_of",
    "is_dns_label",
    "is_label",
    "is_object_name",
    "is_qualified",
    "items",
    "label_faults",
    "pods_of",
    "version_of",
]

Object = Mapping[str, Any]
# Where in the object, and what is wrong there.
Fault = tuple[str, str]
JobRule = Callable[[Object], Iterator[Fault]]

CLUSTER = "spec.rayClusterSpec"


@dataclass(frozen=True)
class Pod:
    """A pod that a RayJob makes."""

    role: str
    """head, submitter, or the name of a group of workers."""
    path: str
    """Of its template in the RayJob."""
    template: Object

    @property
    def spec(self) -> Object:
        """The template's spec."""
        found: Object = at(self.template, "spec") or {}
        return found

    @property
    def is_ray(self) -> bool:
        """Whether Ray is started in it."""
        return self.role != "submitter"

    def containers(self) -> Iterator[tuple[str, Object]]:
        """Every container with its path, init containers included."""
        for kind in ("initContainers", "containers", "ephemeralContainers"):
            for i, container in enumerate(items(self.spec, kind)):
                yield f"{self.path}.spec.{kind}.{i}", container

    def main(self) -> Object:
        """The container that Ray is started in."""
        found: Object = at(self.spec, "containers", 0) or {}
        return found


PodRule = Callable[[Pod], Iterator[Fault]]


def at(node: Any, *keys: str | int) -> Any:
    """What lies there; None where nothing does."""
    for key in keys:
        if isinstance(node, Mapping):
            node = node.get(key)
        elif isinstance(node, Sequence) and not isinstance(node, str) and isinstance(key, int) and key < len(node):
            node = node[key]
        else:
            return None
    return node


def items(node: Any, *keys: str | int) -> list[Any]:
    """The list that lies there; [] where none does."""
    found = at(node, *keys)
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else []


def groups_of(job: Object) -> Iterator[tuple[str, str, Object]]:
    """The head's group and the workers': name, path, group."""
    head = at(job, "spec", "rayClusterSpec", "headGroupSpec")
    if head is not None:
        yield "head", f"{CLUSTER}.headGroupSpec", head
    for i, group in enumerate(items(job, "spec", "rayClusterSpec", "workerGroupSpecs")):
        yield str(at(group, "groupName") or i), f"{CLUSTER}.workerGroupSpecs.{i}", group


def pods_of(job: Object) -> Iterator[Pod]:
    """The pods of a RayJob whose templates stand in it."""
    for name, path, group in groups_of(job):
        yield Pod(name, f"{path}.template", at(group, "template") or {})
    template = at(job, "spec", "submitterPodTemplate")
    if template is not None:
        yield Pod("submitter", "spec.submitterPodTemplate", template)


def env_of(container: Object) -> dict[str, Any]:
    """Its variables: name -> value, None where it comes from elsewhere."""
    return {str(at(entry, "name")): at(entry, "value") for entry in items(container, "env")}


def version_of(text: Any) -> tuple[int, int, int] | None:
    """Major, minor and patch; None when it is no exact version."""
    found = re.fullmatch(r"v?(\d+)\.(\d+)\.(\d+)(?:[-+.]\S*)?", str(text or ""))
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def is_dns_label(name: Any, longest: int = 63, first: str = "[a-z]") -> bool:
    """DNS-1035, or DNS-1123 with `first` "[a-z0-9]"."""
    text = str(name or "")
    return len(text) <= longest and bool(re.fullmatch(rf"{first}([-a-z0-9]*[a-z0-9])?", text))


def is_object_name(name: Any) -> bool:
    """Whether most objects may be called so: DNS-1123 labels with dots between them."""
    return len(str(name)) <= 253 and all(is_dns_label(part, first="[a-z0-9]") for part in str(name).split("."))


def is_label(value: Any) -> bool:
    """Whether a label may have that value."""
    return isinstance(value, str) and bool(re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value))


def is_qualified(key: Any) -> bool:
    """Whether a label or an annotation may have that key: name, or domain/name."""
    domain, slash, name = str(key).rpartition("/")
    parts = domain.split(".") if slash else []
    return bool(name) and is_label(name) and all(is_dns_label(part, first="[a-z0-9]") for part in parts)


def label_faults(path: str, labels: Any) -> Iterator[Fault]:
    """Labels that Kubernetes would refuse."""
    for key, value in (labels or {}).items():
        if not is_qualified(key):
            yield path, f"found the key {key!r}, which no label may have; keys are domain/name of at most 63 characters"
        if not is_label(value):
            yield f"{path}.{key}", f"found {value!r}; a label is at most 63 letters, digits, dashes, dots, underscores"
