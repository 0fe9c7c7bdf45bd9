"""What the manifests have pods do, done here: the entrypoint, the head's hook, and a new cluster that goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import s3fs
from harness import dltrain, make_spec, start, write_data, write_spec
from ports import free_ports

from dltrain.deploying.pods import SPEC_FILE

STEPS, SLOW = 400, 0.2


def printed(spec: Path) -> dict[str, Any]:
    """What `dltrain k8s` prints: kind -> object."""
    done = dltrain("k8s", str(spec), "--image", "registry/dltrain:1", "--s3-secret", "s3", "--json")
    assert done.code == 0, done.err
    return {item["kind"]: item for item in done.json["items"]}


def test_a_cluster_is_ended_and_another_goes_on(s3: Any, tmp_path: Path) -> None:
    bucket = f"k8s-{tmp_path.name[-20:].lower().replace('_', '-').strip('-')}"
    s3.make_bucket(bucket)
    fs = s3fs.S3FileSystem(key=s3.access_key, secret=s3.secret_key, endpoint_url=s3.endpoint)
    fs.put(str(write_data(tmp_path / "train")), f"{bucket}/train", recursive=True)
    spec = make_spec(
        tmp_path,
        data={"train": f"s3://{bucket}/train"},
        runs=f"s3://{bucket}/runs",
        args={"seconds": SLOW},
        # More than are made before it is stopped, on a machine that is busy with other things too.
        train={"steps": STEPS},
        checkpoint={"every": 400},
        metrics={"port": free_ports(1)[0]},
    )
    objects = printed(write_spec(tmp_path, spec))
    cluster = objects["RayJob"]["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]

    mounted = tmp_path / "mounted.yaml"
    mounted.write_text(objects["ConfigMap"]["data"]["spec.yaml"])
    program, *words = objects["RayJob"]["spec"]["entrypoint"].replace(SPEC_FILE, str(mounted)).split()
    hook = [word.replace(SPEC_FILE, str(mounted)) for word in head["lifecycle"]["preStop"]["exec"]["command"]]
    env = {**s3.env, **{entry["name"]: entry["value"] for entry in head["env"]}, "RAY_ADDRESS": ""}
    assert program == "dltrain"

    # Each start has a Ray of its own, as each retry has.
    first = start(*words, "--json", env=env)
    harness.wait_for(lambda: step_of(env) >= 2, first)
    stopped = subprocess.run([sys.executable, *hook[1:-1], str(harness.SECONDS)], capture_output=True, text=True)
    done = harness.finish(first)
    assert stopped.stdout == "1 of 1 drivers have ended\n"
    # A failed job, which backoffLimit starts again.
    assert (done.code, done.json["status"]) == (143, "stopped")
    assert 2 <= done.json["steps"] < STEPS
    saved = dltrain("checkpoint", "list", "tiny", "--json", env=env).json["checkpoints"]
    assert [row["step"] for row in saved] == [done.json["steps"]]

    last = done.json["steps"] + 10
    again = dltrain(*words, f"train.steps={last}", "--json", env=env)
    assert again.code == 0, again.err
    assert (again.json["status"], again.json["steps"]) == ("finished", last)
    assert dltrain("audit", "tiny", env=env).code == 0


def step_of(env: dict[str, str]) -> int:
    done = dltrain("status", "tiny", "--json", env=env)
    return int(json.loads(done.out).get("step", 0)) if done.code == 0 else 0
