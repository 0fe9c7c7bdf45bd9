"""The lab's command without a lab: what it says, what it takes, and what it makes of the tools' answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys

import pytest

from cluster import lab_command, network
from cluster.lab import main
from cluster.network import Cable

VERBS = ("up", "list", "exec", "cut", "mend", "slow", "kill", "start", "add", "down")


@pytest.fixture
def no_labs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that could have labs, and has none."""
    monkeypatch.setattr(lab_command, "what_is_missing", lambda: "")
    monkeypatch.setattr(network, "_run", lambda *_, **__: "")


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_every_verb_at_work(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    shown = set(re.findall(r"python -m cluster\.lab (\w+)", text)) | {"start"}
    assert shown == set(VERBS)
    assert "`start 1`" in text
    assert "Exit codes" in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_says_what_it_does(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, verb)
    assert "--json" in text
    assert re.search(r"\n\n[A-Z`-][^\n]{15,}", text), text
    # Each option says what it is.
    for option in re.findall(r"\n  (--[a-z-]+)([^\n]*)(\n {20,}[^\n]+)?", text):
        assert len(" ".join(option[1:]).split()) > 2, option


@pytest.mark.parametrize("verb", ["up", "list", "down"])
def test_without_root_it_says_so(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main([verb]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lab: there can be no lab here: network namespaces need root")
    assert "sudo" in err
    assert main([verb, "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == 2
    assert "root" in answer["error"]


def test_without_iproute2_or_linux_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert main(["up"]) == 2
    assert "ip and tc not found. Try: apt-get install iproute2" in capsys.readouterr().err
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["up"]) == 2
    assert "this is darwin" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["up", "--hosts", "0"],
        ["up", "--hosts", "two"],
        ["up", "--env", "NAME"],
        ["slow", "1"],
        ["cut", "x"],
        ["cut"],
        ["fly"],
        [],
    ],
)
def test_wrong_arguments_are_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(wrong)
    assert end.value.code == 2
    assert "usage: python -m cluster.lab" in capsys.readouterr().err


@pytest.mark.usefixtures("no_labs")
def test_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "no lab is up" in capsys.readouterr().out
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"labs": []}
    assert main(["down", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"labs": []}
    assert main(["cut", "1"]) == 2
    assert "which lab? Up on this machine: none" in capsys.readouterr().err
    assert main(["cut", "1", "--lab", "lab123456", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def test_of_several_labs_none_is_taken_down_by_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(lab_command, "what_is_missing", lambda: "")
    monkeypatch.setattr(lab_command, "unowned", lambda: ["lab111111", "lab222222"])
    monkeypatch.setattr(lab_command, "all_networks", lambda: ["lab111111", "lab222222", "lab333333"])
    monkeypatch.setattr(lab_command, "take_down", taken.append)
    assert main(["down"]) == 2
    assert "lab111111, lab222222" in capsys.readouterr().err
    assert taken == []
    assert main(["down", "--lab", "lab222222"]) == 0
    assert taken == ["lab222222"]
    assert main(["down", "--all"]) == 0
    assert taken[1:] == ["lab111111", "lab222222", "lab333333"]


# As `ip -j link show` and `tc -j qdisc show` of iproute2 6.1 say it.
UP = '[{"ifname":"port0","flags":["BROADCAST","MULTICAST","UP","LOWER_UP"],"qdisc":"noqueue","operstate":"UP"}]'
DOWN = '[{"ifname":"port0","flags":["BROADCAST","MULTICAST","M-DOWN"],"qdisc":"noop","operstate":"DOWN"}]'
FREE = '[{"kind":"noqueue","handle":"0:","root":true,"refcnt":2,"options":{}}]'
LIMITED = '[{"kind":"tbf","root":true,"options":{"rate":12500000,"burst":4087,"lat":50000}}]'


@pytest.mark.parametrize(
    ("link", "limits", "cable"),
    [(UP, FREE, Cable(True, None)), (UP, "[]", Cable(True, None)), (DOWN, LIMITED, Cable(False, 100.0))],
)
def test_a_cable_is_read_off_the_tools(link: str, limits: str, cable: Cable) -> None:
    assert network._cable(link, limits) == cable


def test_a_lab_as_text() -> None:
    hosts = [
        {"host": 0, "address": "10.77.0.2", "processes": 9, "cable": "whole", "mbit": None},
        {"host": 1, "address": "10.77.0.3", "processes": 0, "cable": "cut", "mbit": 2.5},
    ]
    lab = {"lab": "lab1a2b3c", "address": "10.77.0.2:6379", "owner": 77, "hosts": hosts}
    assert lab_command._lines(lab) == [
        "lab1a2b3c: 2 hosts, Ray at 10.77.0.2:6379, ends with process 77",
        "  host 0  10.77.0.2  9 processes, cable whole",
        "  host 1  10.77.0.3  0 processes, cable cut, 2.5 Mbit/s",
    ]
    assert "Ray" not in lab_command._lines({**lab, "address": None})[0]


def test_a_new_lab_says_what_to_do_with_it() -> None:
    text = lab_command._welcome("lab1a2b3c", "10.77.0.2:6379", 3)
    assert "exec 0 -- dltrain run job.yaml --address 10.77.0.2:6379" in text
    assert "dltrain" not in lab_command._welcome("lab1a2b3c", "", 3)
