"""Manifests against the schemas that an API server would have, and kustomize's own word on k8s/.

The custom resources' schemas are made from the CRDs of KubeRay, Kueue and the Prometheus and Grafana operators, strict:
a field that is not in them is refused. They are no part of the project: DLTRAIN_CRD_SCHEMAS names a folder of
`<group>_<kind>_<version>.json`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
import yaml

from cluster.kustomize import BASE, OVERLAYS, SPEC
from dltrain.deploying.manifests import objects_of
from dltrain.deploying.options import Options, resolve
from dltrain.deploying.pods import capabilities_of
from dltrain.deploying.rules import check

K8S = harness.ROOT / "k8s"
# The oldest and the newest Kubernetes that is looked at.
VERSIONS = ("1.30", "1.34")
FOLDERS = ["base", *(f"overlays/{name}" for name in OVERLAYS)]
Objects = list[dict[str, Any]]


# ---- what judges ----


@pytest.fixture(scope="session")
def schemas() -> Path:
    """The custom resources' schemas."""
    folder = os.environ.get("DLTRAIN_CRD_SCHEMAS")
    if not folder:
        pytest.skip("DLTRAIN_CRD_SCHEMAS is not set: a folder of schemas made from the operators' CRDs")
    if not any(Path(folder).glob("ray.io_rayjob_*.json")):
        pytest.fail(f"DLTRAIN_CRD_SCHEMAS: no schema of a RayJob in {folder}")
    return Path(folder)


@pytest.fixture(scope="session")
def kubectl() -> str:
    """One whose kustomize knows components."""
    path = shutil.which("kubectl")
    if path is None:
        pytest.skip("no kubectl here: apt-get install kubernetes-client")
    told = subprocess.run([path, "version", "--client", "-o", "json"], capture_output=True, text=True).stdout
    version = re.search(r"v(\d+)", json.loads(told).get("kustomizeVersion", "v2"))
    if version is None or int(version[1]) < 4:
        pytest.skip("this kubectl is older than 1.21, and its kustomize knows no components")
    return path


def kustomized(kubectl: str, folder: Path | str) -> Objects:
    """What kustomize makes of a folder."""
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def keyed(_validator: Any, kind: str, items: Any, schema: Any) -> Iterator[Any]:
    """x-kubernetes-list-type: a key twice in a `map`, an item twice in a `set`."""
    import jsonschema

    if not isinstance(items, list) or kind not in ("map", "set"):
        return
    names = schema.get("x-kubernetes-list-map-keys", [])
    keys = [json.dumps([item.get(name) for name in names] if kind == "map" else item) for item in items]
    if len(set(keys)) < len(keys):
        yield jsonschema.ValidationError(f"found a key twice in {sorted(keys)}")


@functools.cache
def validator(path: Path) -> Any:
    import jsonschema

    kind = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"x-kubernetes-list-type": keyed})
    return kind(json.loads(path.read_text()))


def custom_faults(schemas: Path, item: dict[str, Any]) -> list[str]:
    """What is wrong with a custom resource; one without a schema is a fault."""
    group, _, version = item["apiVersion"].rpartition("/")
    path = schemas / f"{group}_{item['kind'].lower()}_{version}.json"
    if not path.exists():
        return [f"no schema of {item['kind']} {item['apiVersion']}"]
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator(path).iter_errors(item)
    ]


def builtin_faults(item: dict[str, Any]) -> list[str]:
    """What is wrong with one of Kubernetes' own."""
    import kubernetes_validate

    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {error.message}")
    return found


def is_builtin(item: dict[str, Any]) -> bool:
    group = item["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.startswith("kueue."))


def made(options: Options) -> Objects:
    return objects_of(resolve(SPEC, options))


PRINTED = {
    "plain": Options(image="registry/dltrain:1"),
    "everything": Options(
        image="registry/dltrain:1",
        namespace="training",
        workers=2,
        gpus=8,
        env={"AWS_REGION": "eu-west-1"},
        s3_secret="s3",
        identity={"iam.gke.io/gcp-service-account": "dltrain@project.iam.gserviceaccount.com"},
        pull_secret="registry",
        node_selector={"pool": "h100"},
        queue="training",
        priority="high",
        spot=True,
        rdma={"rdma/hca": 8},
    ),
    **OVERLAYS,
}


# ---- what is judged ----


@pytest.mark.parametrize("name", PRINTED)
def test_what_is_printed_fits_the_custom_schemas(schemas: Path, name: str) -> None:
    custom = [item for item in made(PRINTED[name]) if not is_builtin(item)]
    assert {item["kind"] for item in custom} == {"RayJob", "PodMonitor"}
    assert [fault for item in custom for fault in custom_faults(schemas, item)] == []


@pytest.mark.parametrize("name", PRINTED)
def test_what_is_printed_fits_kubernetes(name: str) -> None:
    builtin = [item for item in made(PRINTED[name]) if is_builtin(item)]
    assert {item["kind"] for item in builtin} == {"ConfigMap", "ServiceAccount", "NetworkPolicy"}
    assert [fault for item in builtin for fault in builtin_faults(item)] == []


@pytest.mark.parametrize("name", PRINTED)
def test_pods_fit_kubernetes(name: str) -> None:
    """The CRD has the pods' fields too; Kubernetes' own schema is another witness."""
    job = made(PRINTED[name])[-1]["spec"]
    groups = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    for template in [*(group["template"] for group in groups), job["submitterPodTemplate"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}}
        assert builtin_faults({**pod, "spec": template["spec"]}) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_builds_what_passes(kubectl: str, folder: str) -> None:
    objects = kustomized(kubectl, K8S / folder)
    assert [fault for item in objects if is_builtin(item) for fault in builtin_faults(item)] == []
    assert check(objects, ("IPC_LOCK",) if folder.endswith("rdma") else ()) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_builds_what_fits_the_custom_schemas(kubectl: str, schemas: Path, folder: str) -> None:
    custom = [item for item in kustomized(kubectl, K8S / folder) if not is_builtin(item)]
    assert [fault for item in custom for fault in custom_faults(schemas, item)] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_kustomize_builds_what_the_command_prints(kubectl: str, name: str) -> None:
    found = {(item["kind"], item["metadata"]["name"]): item for item in kustomized(kubectl, K8S / "overlays" / name)}
    for item in made(OVERLAYS[name]):
        assert found[item["kind"], item["metadata"]["name"]] == item


def test_components_can_be_combined(kubectl: str, tmp_path: Path) -> None:
    """As somebody would who keeps a copy of k8s/."""
    shutil.copytree(K8S, tmp_path / "k8s")
    own = tmp_path / "own"
    own.mkdir()
    names = ["gpu", "rdma", "spot", "kueue", "s3-irsa"]
    kustomization = {
        "resources": ["../k8s/base"],
        "components": [f"../k8s/components/{name}" for name in names],
        "namespace": "training",
        "images": [{"name": "dltrain", "newName": "registry/me/dltrain", "newTag": "2"}],
    }
    (own / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    objects = kustomized(kubectl, own)
    assert check(objects, ("IPC_LOCK",)) == []
    options = {**vars(OVERLAYS["rdma"]), **{k: v for name in names[2:] for k, v in changed(OVERLAYS[name]).items()}}
    wanted = made(Options(**{**options, "namespace": "training", "image": "registry/me/dltrain:2"}))
    found = {item["kind"]: item for item in objects}
    assert found == {item["kind"]: item for item in wanted}


def changed(options: Options) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if value != vars(BASE)[key]}


# ---- the judges themselves ----

Break = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        ("RayJob", lambda o: o["spec"].update(backofLimit=3)),
        ("RayJob", lambda o: o["spec"].update(backoffLimit="3")),
        ("RayJob", lambda o: o["spec"]["rayClusterSpec"]["headGroupSpec"].pop("template")),
        ("RayJob", lambda o: o["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens")),
        ("RayJob", lambda o: o["spec"]["submitterPodTemplate"]["spec"].update(securityContexts={})),
        ("PodMonitor", lambda o: o["spec"]["podMetricsEndpoints"][0].update(interval="15")),
        ("PodMonitor", lambda o: o["spec"]["podMetricsEndpoints"][0].update(targetPorts=9464)),
    ],
)
def test_the_custom_schemas_notice(schemas: Path, kind: str, broken: Break) -> None:
    item = copy.deepcopy(next(item for item in made(BASE) if item["kind"] == kind))
    broken(item)
    assert custom_faults(schemas, item)


def test_a_key_twice_is_noticed(schemas: Path) -> None:
    job = copy.deepcopy(made(BASE)[-1])
    pod = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["containers"] *= 2
    assert any("twice" in fault for fault in custom_faults(schemas, job))


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        ("NetworkPolicy", lambda o: o["spec"].update(podSelectors={})),
        ("NetworkPolicy", lambda o: o["spec"].update(policyTypes="Ingress")),
        ("ServiceAccount", lambda o: o.update(automountToken=True)),
        ("ConfigMap", lambda o: o.update(data={"spec.yaml": {"name": "x"}})),
    ],
)
def test_kubernetes_schemas_notice(kind: str, broken: Break) -> None:
    item = copy.deepcopy(next(item for item in made(BASE) if item["kind"] == kind))
    broken(item)
    assert len(builtin_faults(item)) == len(VERSIONS)


def test_what_is_printed_breaks_no_rule() -> None:
    for options in PRINTED.values():
        assert check(made(options), capabilities_of(options)) == []
