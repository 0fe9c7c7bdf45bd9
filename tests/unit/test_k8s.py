"""`dltrain k8s`: what is refused, what is printed, and that k8s/ is what the code makes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import harness
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster import kustomize
from cluster.kustomize import OVERLAYS, SPEC, patch
from dltrain import cli
from dltrain.deploying.manifests import build, objects_of, to_yaml
from dltrain.deploying.options import NAME_LENGTH, Options, looks_secret, object_name, resolve
from dltrain.deploying.pods import times
from dltrain.deploying.quantity import mebibytes, quantity
from dltrain.deploying.rules import RULES
from dltrain.errors import SpecError
from dltrain.observing.view import make_view
from dltrain.running.driver import Driver
from dltrain.spec import load_spec, parse_spec

IMAGE = ["--image", "registry/me/dltrain:1"]
KINDS = ["ConfigMap", "ServiceAccount", "NetworkPolicy", "PodMonitor", "RayJob"]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A spec's file, with its runs in object storage."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(SPEC.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["k8s", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """Kind -> object."""
    code, out, err = call(capsys, *arguments)
    assert code == 0, err
    return {item["kind"]: item for item in yaml.safe_load_all(out)}


def parts(objects: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """The job, and the containers of its head, workers and submitter."""
    job = objects["RayJob"]["spec"]
    templates = [
        job["rayClusterSpec"]["headGroupSpec"]["template"],
        job["rayClusterSpec"]["workerGroupSpecs"][0]["template"],
        job["submitterPodTemplate"],
    ]
    return job, *(template["spec"]["containers"][0] for template in templates)


# ---- what is printed ----


def test_documents_and_json_are_the_same(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    objects = printed(capsys, spec, *IMAGE)
    assert list(objects) == KINDS
    code, out, _ = call(capsys, spec, *IMAGE, "--json")
    assert (code, json.loads(out)) == (0, {"items": list(objects.values())})


def test_options_are_where_they_belong(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    objects = printed(
        capsys, spec, *IMAGE, "--workers", "3", "--gpus-per-worker", "4", "--memory-per-worker", "256Gi",
        "--shm-per-worker", "32Gi", "--namespace", "training", "--queue", "gold", "--priority", "high",
        "--s3-secret", "dltrain-s3", "--env", "AWS_REGION=eu-west-1", "--identity", "a.b/role=c", "--spot",
        "--pull-secret", "registry", "--node-selector", "pool=h100", "--rdma", "rdma/hca=2", "--deadline-hours", "48",
        "--start-minutes", "30", "--ray-version", "2.60.0", "data.cache.dir=/cache", "data.cache.gb=100",
    )  # fmt: skip
    job, head, worker, submitter = parts(objects)
    group = job["rayClusterSpec"]["workerGroupSpecs"][0]
    pod = group["template"]["spec"]
    assert {item["metadata"]["namespace"] for item in objects.values()} == {"training"}
    assert (group["replicas"], group["resources"], job["backoffLimit"]) == (3, {"CPU": "4"}, 20)
    assert (job["activeDeadlineSeconds"], job["preRunningDeadlineSeconds"]) == (48 * 3600, 1800)
    limits = {"cpu": "12", "memory": "256Gi", "nvidia.com/gpu": "4", "rdma/hca": "2"}
    assert worker["resources"] == {"limits": limits, "requests": limits}
    assert objects["RayJob"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gold"
    assert objects["RayJob"]["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert objects["ServiceAccount"]["metadata"]["annotations"] == {"a.b/role": "c"}
    assert {"name": "AWS_REGION", "value": "eu-west-1"} in head["env"]
    assert {"name": "AWS_REGION", "value": "eu-west-1"} in worker["env"]
    assert head["envFrom"] == worker["envFrom"] == [{"secretRef": {"name": "dltrain-s3"}}]
    assert "envFrom" not in submitter
    assert worker["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert (pod["nodeSelector"], pod["imagePullSecrets"]) == ({"pool": "h100"}, [{"name": "registry"}])
    assert {t["key"] for t in pod["tolerations"]} >= {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    assert pod["terminationGracePeriodSeconds"] == 25
    sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"]}
    assert sizes["shm"] == "32Gi"
    assert 100e9 < quantity(sizes["data-cache"]) <= 110e9
    assert {"name": "data-cache", "mountPath": "/cache"} in worker["volumeMounts"]
    assert {container["image"] for container in (head, worker, submitter)} == {"registry/me/dltrain:1"}


@pytest.mark.parametrize(
    ("arguments", "pods", "ranks"),
    [
        (["workers=5"], 5, "workers.min=5 workers.max=5 workers.gpus=0"),
        (["workers.min=2", "workers.max=10", "--gpus-per-worker", "4"], 3, "workers.min=2 workers.max=10"),
        (["--workers", "4"], 4, "workers.min=2 workers.max=4"),
        (["--workers", "4", "--gpus-per-worker", "8"], 4, "workers.min=2 workers.max=32 workers.gpus=1"),
        (["workers.cpus=0.5", "workers.max=6"], 3, "workers.min=2 workers.max=6"),
    ],
)
def test_pods_for_ranks(
    capsys: pytest.CaptureFixture[str], spec: Path, arguments: list[str], pods: int, ranks: str
) -> None:
    job, *_ = parts(printed(capsys, spec, *IMAGE, *arguments))
    assert job["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == pods
    assert ranks in job["entrypoint"]


def test_without_the_prometheus_operator(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    assert "PodMonitor" not in printed(capsys, spec, *IMAGE, "--no-monitor")


def test_custom_resources_of_ranks_are_on_the_pods(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    job, *_ = parts(printed(capsys, spec, *IMAGE, "--gpus-per-worker", "4", "workers.resources={nic: 1}"))
    assert job["rayClusterSpec"]["workerGroupSpecs"][0]["resources"] == {"CPU": "4", "nic": "4"}


# ---- the parts agree ----


def test_the_entrypoint_is_a_run_of_the_spec(capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path) -> None:
    objects = printed(capsys, spec, *IMAGE, "optim.lr=0.1", "name=other", "metrics.port=9500", "--workers", "3")
    job, head, *_ = parts(objects)
    verb, path, *overrides = job["entrypoint"].split()[1:]
    mount = next(mount for mount in head["volumeMounts"] if mount["name"] == "spec")
    assert (verb, path) == ("run", f"{mount['mountPath']}/spec.yaml")
    file = tmp_path / "mounted.yaml"
    file.write_text(objects["ConfigMap"]["data"]["spec.yaml"])
    loaded = load_spec(file, overrides)
    before = load_spec(spec, ["optim.lr=0.1", "name=other"])
    assert loaded.identity == before.identity
    assert (loaded.name, loaded.optim, loaded.runs) == ("other", before.optim, SPEC.runs)
    assert (loaded.workers.min, loaded.workers.max, loaded.workers.gpus) == (2, 3, 0)
    assert (loaded.metrics.host, loaded.metrics.port) == ("0.0.0.0", 9500)
    assert {"name": "dltrain-metrics", "containerPort": 9500} in head["ports"]
    assert {"name": "DLTRAIN_RUNS", "value": loaded.runs} in head["env"]


def test_hooks_are_commands_that_there_are(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    _, head, worker, _ = parts(printed(capsys, spec, *IMAGE))
    program, *words = worker["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "dltrain"
    # No worker is on this machine, so it has nothing to wait for.
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert not caught.value.code
    program, *words = head["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "python"
    assert subprocess.run([sys.executable, *words], capture_output=True, text=True).stdout.startswith("0 of 0 drivers")


@pytest.mark.parametrize("grace", [20, 25, 60, 120, 300, 3600])
def test_a_grace_period_holds_the_hook_and_the_drain(grace: int) -> None:
    wait, drain = times(grace)
    assert wait > drain > 0
    assert wait + drain <= grace


def test_a_long_grace_period_is_the_heads_too(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    job, head, worker, _ = parts(printed(capsys, spec, *IMAGE, "--grace", "900"))
    cluster = job["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 900
    wait = head["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": wait} in head["env"]
    assert worker["lifecycle"]["preStop"]["exec"]["command"][-1] == wait


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs=./runs"], "runs: found './runs', a place on a machine's own disk; every retry is a new cluster"),
        (["runs=file:///mnt/runs"], "set runs=s3://bucket/runs"),
        (["metrics.port=0"], "metrics.port: found 0, any free port"),
        (["metrics.port=8265"], "metrics.port: found 8265, which is Ray's (dashboard)"),
        (["data.train=https://me:hunter2@host/x"], "data.train: has a password in its URL"),
        (["runs=s3://key:hunter2@bucket/runs"], "runs: has a password in its URL"),
        (["data.cache={dir: cache, gb: 1}"], "data.cache.dir: found 'cache'"),
        (["--env", "AWS_SECRET_ACCESS_KEY=hunter2"], "--env: AWS_SECRET_ACCESS_KEY looks like a secret"),
        (["--env", "hunter2"], "--env: needs NAME=VALUE"),
        (["--env", "a b=1"], "--env: found 'a b', which is not a variable's name"),
        (["--priority", "high"], "give --queue too"),
        (["--workers", "-1"], "--workers: found -1"),
        (["--gpus-per-worker", "-1"], "1 fault\n  --gpus-per-worker: found -1"),
        (["--gpus-per-worker", "2", "workers.gpus=0"], "workers.gpus: is 0, but --gpus-per-worker is 2"),
        (["workers.gpus=1"], "workers.gpus: is 1, but pods would have none"),
        (["--workers", "1"], "workers.min: 2 ranks don't fit: --workers 1 x 1 rank each gives 1"),
        (["--workers", "9", "--gpus-per-worker", "8"], "batch.global: 64 rows can't feed every rank"),
        (["--cpus-per-worker", "1", "--gpus-per-worker", "2"], "--cpus-per-worker: found 1; the ranks of a pod need 2"),
        (["--memory-per-worker", "lots"], "--memory-per-worker: found 'lots', which is not a quantity"),
        (["--shm-per-worker", "4Gi"], "--shm-per-worker: 4Gi is not less than --memory-per-worker 4Gi"),
        (["--grace", "5"], "--grace: found 5"),
        (["--retries", "-1"], "--retries: found -1"),
        (["--deadline-hours", "0"], "--deadline-hours: found 0"),
        (["--rdma", "rdma/hca=1"], "give --gpus-per-worker too"),
        (["--rdma", "rdma/hca", "--gpus-per-worker", "1"], "--rdma: needs NAME=VALUE"),
        (["--rdma", "rdma/hca=x", "--gpus-per-worker", "1"], "--rdma: found rdma/hca=x"),
        (["--ray-version", "2.60"], "RayJob/image-cnn spec.rayClusterSpec.rayVersion: must be exact"),
        (["--ray-version", "2.50.0"], "needs 2.52.0 or later (kuberay.auth)"),
        (["--queue", "My Queue", "--workers", "2"], "(kueue.names)"),
        (["--node-selector", "pool=a b"], "template.spec.nodeSelector.pool: found 'a b'"),
        (["--namespace", "My Space"], "(names.namespace)"),
        (["--s3-secret", "My_Secret"], "(pod.references)"),
        (["--identity", "a b=c"], "(names.labels)"),
        (["engine.zero=7"], "engine.zero: found 7"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], spec: Path, arguments: list[str], said: str) -> None:
    code, out, err = call(capsys, spec, *IMAGE, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "hunter2" not in err
    assert "Traceback" not in err


def test_all_faults_at_once(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    bad = ["runs=./runs", "metrics.port=0", "--grace", "1", "--priority", "high", "--memory-per-worker", "1x"]
    code, _, err = call(capsys, spec, *IMAGE, *bad)
    assert (code, err.count("\n  ")) == (2, 5)


def test_an_object_that_breaks_a_rule_is_not_printed() -> None:
    with pytest.raises(SpecError, match=r"RayJob/image-cnn spec.rayClusterSpec.rayVersion: .* \(run.cluster\)"):
        build(SPEC, Options(image="a", ray_version="nightly"))


def test_what_may_be_in_the_way_is_said(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    local = ["data.train=.data/digits", "--rdma", "rdma/hca=1", "--gpus-per-worker", "1", "--namespace", "ml"]
    _, out, err = call(capsys, spec, *IMAGE, *local, "--json")
    assert json.loads(out)["items"]
    assert "'.data/digits' is a path in the image" in err
    assert "kubectl label namespace ml pod-security.kubernetes.io/enforce=privileged" in err
    assert "no credentials but those of their nodes" in err
    assert not call(capsys, spec, *IMAGE, "--s3-secret", "s3")[2]


# ---- secrets ----


def test_no_secret_of_the_environment_is_printed(
    capsys: pytest.CaptureFixture[str], spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"canary-{name}")
    for json_too in ([], ["--json"]):
        code, out, err = call(capsys, spec, *IMAGE, "--s3-secret", "dltrain-s3", *json_too)
        assert code == 0
        assert "canary" not in out + err
        assert "dltrain-s3" in out


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("HF_TOKEN", True),
        ("db_password", True),
        ("WANDB_API_KEY", True),
        ("AWS_REGION", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", False),
        ("NCCL_DEBUG", False),
    ],
)
def test_what_looks_like_a_secret(name: str, secret: bool) -> None:
    assert looks_secret(name) is secret


# ---- names and numbers ----


@given(st.text(alphabet="abcXYZ019._-", min_size=1, max_size=63))
def test_names_are_ones_that_kubernetes_takes(run: str) -> None:
    name = object_name(run)
    assert len(name) <= NAME_LENGTH
    assert name[0].isalpha()
    assert name[-1] != "-"
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@given(st.lists(st.text(alphabet="aA1._-", min_size=1, max_size=60), min_size=2, max_size=2, unique=True))
def test_two_runs_have_two_names(runs: list[str]) -> None:
    assert object_name(runs[0]) != object_name(runs[1])


def test_a_good_name_is_kept() -> None:
    assert object_name("image-cnn") == "image-cnn"
    assert object_name("Image.CNN").startswith("image-cnn-")
    assert object_name("3d").startswith("run-3d-")


@pytest.mark.parametrize(
    ("text", "number"),
    [("4", 4), ("500m", Fraction(1, 2)), ("16Gi", 2**34), ("1.5k", 1500), ("1e3", 1000), ("2E", 2 * 10**18)],
)
def test_quantities(text: str, number: Fraction) -> None:
    assert quantity(text) == number


@pytest.mark.parametrize("text", ["", "Gi", "4 Gi", "4gb", "-1", "1ee3", None])
def test_what_is_no_quantity(text: Any) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        quantity(text)


@given(st.integers(2**20, 2**45))
def test_mebibytes_are_rounded_down(num_bytes: int) -> None:
    assert 0 <= num_bytes - quantity(mebibytes(num_bytes)) < 2**20


# ---- k8s/ ----


def test_the_folder_is_what_the_code_makes() -> None:
    made = kustomize.files(harness.ROOT)
    folder = harness.ROOT / "k8s"
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.yaml")}
    assert found == made, "run: python -m cluster.kustomize k8s"


def test_writing_takes_away_what_is_no_longer_made_and_nothing_else(tmp_path: Path) -> None:
    mine, old = tmp_path / "job.yaml", tmp_path / "overlays" / "gone" / "kustomization.yaml"
    old.parent.mkdir(parents=True)
    mine.write_text("name: digits\n")
    old.write_text((harness.ROOT / "k8s" / "base" / "kustomization.yaml").read_text())
    kustomize.write(tmp_path, harness.ROOT)
    assert mine.read_text() == "name: digits\n"
    assert not old.exists()
    assert (tmp_path / "base" / "kustomization.yaml").exists()


def test_monitoring_goes_where_the_run_goes() -> None:
    """Without a second PodMonitor: everything would be counted twice."""
    made = kustomize.files(harness.ROOT)
    resources = yaml.safe_load(made["overlays/monitoring/kustomization.yaml"])["resources"]
    assert resources == ["../../base", "monitoring.yaml"]
    objects = list(yaml.safe_load_all(made["overlays/monitoring/monitoring.yaml"]))
    assert {item["kind"] for item in objects} == {"PrometheusRule", "ConfigMap", "GrafanaDashboard"}
    assert not [item for item in objects if "namespace" in item["metadata"]]


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_what_the_command_prints(name: str) -> None:
    """With a JSON patch of our own; tests/e2e/test_k8s_schemas.py has kubectl do it."""
    folder = harness.ROOT / "k8s"
    items = [item for path in (folder / "base").glob("*.yaml") for item in yaml.safe_load_all(path.read_text())]
    objects = {item["kind"]: item for item in items if "kind" in item and item["kind"] != "Kustomization"}
    for component in yaml.safe_load((folder / "overlays" / name / "kustomization.yaml").read_text()).get(
        "components", []
    ):
        directory = (folder / "overlays" / name / component).resolve()
        for entry in yaml.safe_load((directory / "kustomization.yaml").read_text())["patches"]:
            operations = yaml.safe_load((directory / entry["path"]).read_text())
            kind = entry["target"]["kind"]
            objects[kind] = patched(objects[kind], operations)
    version = objects["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"]
    options = {**vars(OVERLAYS[name]), "ray_version": version}
    wanted = {item["kind"]: item for item in objects_of(resolve(SPEC, Options(**options)))}
    del wanted["ConfigMap"]
    assert objects == wanted


def test_components_change_different_things() -> None:
    """So that any of them can be combined."""
    seen: dict[str, str] = {}
    for name in OVERLAYS:
        for path in (harness.ROOT / "k8s" / "components" / name).glob("*.yaml"):
            for operation in yaml.safe_load(path.read_text()) if path.name != "kustomization.yaml" else []:
                where = f"{path.name} {operation['path']}"
                if not where.endswith("/-"):
                    assert where not in seen, f"{name} and {seen.get(where)} both change {where}"
                seen[where] = name


def patched(node: Any, operations: list[dict[str, Any]]) -> Any:
    """RFC 6902, as far as it is used here."""
    node = json.loads(json.dumps(node))
    for operation in operations:
        *parents, last = (key.replace("~1", "/").replace("~0", "~") for key in operation["path"].split("/"))
        inner: Any = {"": node}
        for key in parents:
            inner = inner[int(key)] if isinstance(inner, list) else inner[key]
        if operation["op"] == "remove":
            del inner[last]
        elif isinstance(inner, list) and last == "-":
            inner.append(operation["value"])
        elif isinstance(inner, list):
            inner[int(last)] = operation["value"]
        elif last == "":
            return operation["value"]
        else:
            inner[last] = operation["value"]
    return node


TREES = st.recursive(
    st.integers(0, 3) | st.sampled_from(["a", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "y/z", "~w"]), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from("pq"), TREES), st.dictionaries(st.sampled_from("pq"), TREES))
def test_a_patch_makes_one_into_the_other(before: Any, after: Any) -> None:
    assert patched(before, patch(before, after)) == after


@given(st.dictionaries(st.text(min_size=1), TREES | st.text()))
def test_yaml_is_read_as_it_was_written(item: Any) -> None:
    assert yaml.safe_load(to_yaml([item])) == item


# ---- the page ----


def test_the_page_tells_what_is_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    page = " ".join((harness.ROOT / "docs" / "kubernetes.md").read_text().split())
    wait, head = (times(seconds)[0] for seconds in (Options(image="a").grace_seconds, 120))
    assert f"none of {len(RULES)} rules" in page
    assert f"{wait} seconds on a worker and {head} on the head" in page
    monkeypatch.setenv("COLUMNS", "300")
    _, out, _ = call(capsys, "--help")
    named = set(re.findall(r"`(--[a-z0-9-]+)", page)) | set(
        re.findall(r" (--[a-z0-9-]+)", page.split("## 3.")[1].split("## 4.")[0])
    )
    assert len(named) > 10
    # Of `dltrain drain`, and of the image's builder.
    others = {"--wait", "--target", "--build-arg"}
    assert {flag for flag in named if flag not in out and flag not in others} == set()


# ---- the head's hook ----

_DRIVER = """
import pathlib, signal, sys, time
def end(number, frame):
    pathlib.Path(sys.argv[3]).write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(600)
"""


def drivers(*commands: list[str]) -> list[subprocess.Popen[str]]:
    """Processes that look like drivers, when they are up."""
    found = [subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) for words in commands]
    for process in found:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
    return found


def hook(spec: str, seconds: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dltrain.deploying.stop_driver", spec, seconds]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_the_driver_of_that_spec_is_told_and_waited_for(tmp_path: Path) -> None:
    program, mark, spec = tmp_path / "dltrain", tmp_path / "mark", str(tmp_path / "spec.yaml")
    program.write_text(_DRIVER)
    other = [str(program), "run", str(tmp_path / "other.yaml"), str(tmp_path / "no-mark")]
    ours, others = drivers([str(program), "run", spec, str(mark)], other)
    with ours, others, hook(spec, "300") as stopping:
        assert ours.wait(harness.SECONDS) == 143
        assert stopping.communicate(timeout=harness.SECONDS)[0] == "1 of 1 drivers have ended\n"
        assert (stopping.returncode, mark.read_text()) == (0, "saved")
        assert others.poll() is None
        others.kill()


def test_who_does_not_end_is_told_of(tmp_path: Path) -> None:
    program, spec = tmp_path / "dltrain", str(tmp_path / "spec.yaml")
    program.write_text(_DRIVER.replace("sys.exit(143)", "time.sleep(600)"))
    (driver,) = drivers([str(program), "run", spec, str(tmp_path / "mark")])
    with driver, hook(spec, "0.5") as stopping:
        assert stopping.communicate(timeout=harness.SECONDS)[0] == "0 of 1 drivers have ended\n"
        assert stopping.returncode == 1
        assert driver.poll() is None
        driver.kill()


def test_a_second_sigterm_is_no_second_wish(tmp_path: Path) -> None:
    driver = Driver(parse_spec(harness.make_spec(tmp_path)), make_view(json=True))
    driver.stop(signal.SIGTERM)
    driver.stop(signal.SIGTERM)
    assert driver._signal == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        driver.stop(signal.SIGINT)
