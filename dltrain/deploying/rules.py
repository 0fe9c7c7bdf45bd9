"""What KubeRay's operator, Kueue, Pod Security and dltrain itself ask of manifests, as rules without a cluster.

    for finding in check(objects): print(finding)
    kubectl kustomize k8s/overlays/gpu | python -m dltrain.deploying.rules      # exit 1 when there are findings

Every rule is a pure function over plain values; schemas say the rest.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import yaml

from dltrain.deploying.looking import Fault, JobRule, Object, PodRule, at, pods_of
from dltrain.deploying.rules_kuberay import KUBERAY, KUEUE
from dltrain.deploying.rules_pods import PODS, SECURITY, capability_faults
from dltrain.deploying.rules_run import RUN, TOGETHER, name_of

__all__ = ["RULES", "Finding", "check"]

RULES = (*KUBERAY, *KUEUE, *RUN, *SECURITY, *PODS, *TOGETHER)


@dataclass(frozen=True)
class Finding:
    """A rule that an object breaks."""

    rule: str
    item: str
    """Kind and name of the object."""
    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.item} {self.path}: {self.text} ({self.rule})"


def check(objects: Sequence[Object], capabilities: Collection[str] = ()) -> list[Finding]:
    """Everything that is wrong with the objects.

    Args:
        capabilities: those that a pod may have although Pod Security's `restricted` refuses them.
    """
    capable: PodRule = functools.partial(capability_faults, allowed=capabilities)
    pod_rules = {**SECURITY, "security.capabilities": capable, **PODS}
    found = [
        Finding(rule, name_of(item), path, text)
        for item in objects
        if at(item, "kind") == "RayJob"
        for rule, path, text in _of_job(item, {**KUBERAY, **KUEUE, **RUN}, pod_rules)
    ]
    return found + [Finding(rule, *fault) for rule, look in TOGETHER.items() for fault in look(objects)]


def _of_job(
    job: Object, job_rules: dict[str, JobRule], pod_rules: dict[str, PodRule]
) -> Iterator[tuple[str, str, str]]:
    def named(rule: str, faults: Iterator[Fault]) -> Iterator[tuple[str, str, str]]:
        return ((rule, path, text) for path, text in faults)

    for rule, look in job_rules.items():
        yield from named(rule, look(job))
    for pod in pods_of(job):
        for rule, look_at_pod in pod_rules.items():
            yield from named(rule, look_at_pod(pod))


def main() -> int:
    """Checks the YAML documents on stdin."""
    documents = [item for item in yaml.safe_load_all(sys.stdin) if item]
    objects = [inner for item in documents for inner in (item["items"] if item.get("kind") == "List" else [item])]
    for finding in (found := check(objects, sys.argv[1:])):
        print(finding)
    print(f"{len(objects)} objects, {len(found)} findings", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
