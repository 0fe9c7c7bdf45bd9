"""The files for `ray up`: against Ray's own schema and checks, and against what they name."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dltrain import __version__

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "cluster" / "ray-up").glob("*.yaml"))}
COMMANDS = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(FILES[name].read_text())
    return config


def schema() -> Any:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations
    return json.loads(Path(spec.submodule_search_locations[0], "autoscaler", "ray-schema.json").read_text())


def commands(config: dict[str, Any], *kinds: str) -> list[str]:
    return [command for kind in kinds or COMMANDS for command in config.get(kind, [])]


def as_ray_takes_it(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does with a file before it asks the cloud for anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(config, schema())
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_there_is_a_file_for_each_place() -> None:
    assert set(FILES) == {"aws", "onprem"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_ray_up_takes(name: str) -> None:
    prepared = as_ray_takes_it(load(name))
    workers = [kind for key, kind in prepared["available_node_types"].items() if key != prepared["head_node_type"]]
    # On premise Ray has one type for all.
    for kind in workers or prepared["available_node_types"].values():
        assert 0 <= kind["min_workers"] <= kind["max_workers"] <= prepared["max_workers"]
        assert kind["max_workers"] >= 2
    # Nothing comes in by Ray's defaults, which would install another Ray.
    kinds = (*COMMANDS, "initialization_commands", "head_setup_commands", "worker_setup_commands")
    assert set(commands(prepared, *kinds)) == set(commands(load(name), *kinds))


WRONG: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("onprem", lambda c: c.update(min_worker=1)),
    ("onprem", lambda c: c["auth"].update(ssh_key="~/.ssh/id")),
    ("aws", lambda c: c["docker"].update(images="x")),
    ("aws", lambda c: c["available_node_types"]["worker"].update(max_worker=1)),
    ("aws", lambda c: c["available_node_types"]["head"].update(resources={"CPU": 0.5})),
    ("aws", lambda c: c["available_node_types"]["worker"].update(min_workers=9)),
    ("aws", lambda c: c.update(head_node_type="boss")),
    ("aws", lambda c: c["docker"].pop("container_name")),
]


@pytest.mark.parametrize(("name", "spoil"), WRONG)
def test_a_mistake_would_be_seen(name: str, spoil: Callable[[dict[str, Any]], object]) -> None:
    config = load(name)
    spoil(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError)):
        as_ray_takes_it(config)


@pytest.mark.parametrize("name", FILES)
def test_its_commands_are_shell_and_ray_knows_their_options(name: str) -> None:
    from ray.scripts.scripts import start, stop

    found = commands(load(name))
    for command in found:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    started = [match for command in found for match in re.findall(r"ray (start|stop)\b([^;&]*)", command)]
    for verb, options in started:
        (start if verb == "start" else stop).make_context(f"ray {verb}", shlex.split(options))
    assert [verb for verb, _ in started] == ["stop", "start", "stop", "start"]


@pytest.mark.parametrize("name", FILES)
def test_what_its_commands_name_is_there(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "\n".join(commands(load(name)))
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None
    for install in re.findall(r"pip install [^\n]*", text):
        assert "-c ~/dltrain-src/constraints.txt" in install
        assert set(",".join(re.findall(r"\[([\w,]+)\]", install)).split(",")) - {""} <= set(extras)


@pytest.mark.parametrize("name", FILES)
def test_every_node_has_the_token_and_nobody_has_keys(name: str) -> None:
    config = load(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    in_containers = "-e RAY_AUTH_MODE=token" in config.get("docker", {}).get("run_options", [])
    for command in commands(config, *COMMANDS[1:]):
        assert in_containers or "ray start" not in command or "RAY_AUTH_MODE=token" in command
    text = FILES[name].read_text()
    assert not re.search(r"(?i)aws_(access_key_id|secret_access_key|session_token)|AKIA|BEGIN .*PRIVATE", text)
    # The job API and the dashboard are reached over SSH.
    assert "--dashboard-host=127.0.0.1" in text


def test_aws_machines_have_a_profile_and_workers_are_spot() -> None:
    config = load("aws")
    types = config["available_node_types"]
    head, worker = types["head"], types["worker"]
    assert head["resources"] == {"CPU": 0}
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"]
    for kind in (head, worker):
        assert set(kind["node_config"]["IamInstanceProfile"]) == {"Name"}
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])
    # Of the head's rights the workers have none.
    assert head["node_config"]["IamInstanceProfile"] != worker["node_config"]["IamInstanceProfile"]
    assert any("cluster.spot" in command for command in config["worker_start_ray_commands"])


def test_the_image_is_the_one_of_the_dockerfile() -> None:
    image = load("aws")["docker"]["image"]
    built = re.findall(r"-t (\S+)", (ROOT / "cluster" / "Dockerfile").read_text())
    assert image in built
    assert __version__ in image


def test_both_have_the_settings_of_the_image() -> None:
    settings = [re.findall(r"(RAY_\w+)=(\w+)", text) for text in map(str, (image_environment(), load("onprem")))]
    image, onprem = (dict(found) for found in settings)
    assert {"RAY_AUTH_MODE", "RAY_JOB_STOP_WAIT_TIME_S", "RAY_worker_niceness"} <= image.keys() & onprem.keys()
    assert all(image[name] == onprem[name] for name in image.keys() & onprem.keys())


def image_environment() -> str:
    """The variables of the Dockerfile."""
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    return "\n".join(re.findall(r"^ENV (?:.*\\\n)*.*$", text, re.MULTILINE))


@pytest.mark.parametrize("name", FILES)
def test_what_is_to_be_changed_is_marked(name: str) -> None:
    """Addresses and names that only stand for the user's own."""
    for line in FILES[name].read_text().splitlines():
        if re.search(r"192\.0\.2\.|example\.com|sg-0+\b|IamInstanceProfile", line) and not line.startswith("#"):
            assert "CHANGE" in line, line
