"""The command of the lab: one verb per function.

python -m cluster.lab --help
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.lab import Host, Lab, take_down, unowned
from cluster.network import Cable, LabError, LabUsageError, all_networks, what_is_missing

__all__ = ["main"]

_ABOUT = """\
A Ray cluster of several hosts on this machine, to try faults on. Each host is a network namespace with an address and a
cable of its own; files, process ids and shared memory are common to all. Host 0 has Ray's head, and drivers run there.
Needs Linux, root and iproute2; this machine's own network is not touched.

  python -m cluster.lab up --hosts 3                    3 hosts with one CPU slot each, and Ray on them
  python -m cluster.lab exec 0 -- dltrain run job.yaml workers=2 --address 10.77.0.2:6379

and, from another terminal, what can happen to a cluster:

  python -m cluster.lab cut 2       host 2's cable is pulled: its worker ends itself, another host takes over
  python -m cluster.lab mend 2      the cable is back
  python -m cluster.lab slow 1 --mbit 100               host 1 has a bad line; --mbit 0 takes the limit away
  python -m cluster.lab kill 1      host 1 loses its power; `start 1` boots it
  python -m cluster.lab add         one more host: a run below its workers.max grows
  python -m cluster.lab list        what is up, and what state it is in
  python -m cluster.lab down        takes it all away
"""
_ENDS = "Exit codes: 0 done, 1 it did not work, 2 there is no such lab or host, or this machine can't have labs."


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the arguments say; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        missing = what_is_missing()
        if missing:
            raise LabUsageError(f"there can be no lab here: {missing}")
        answer, text, code = options.act(options)
    except LabError as error:
        answer, text, code = {"error": str(error), "exit_code": error.exit_code}, "", error.exit_code
        print(f"lab: {error}", file=sys.stderr)
    if options.json:
        print(json.dumps(answer))
    elif text:
        print(text)
    return int(code)


# What a verb gives: its answer for --json, the same as text, and the exit code.
Answer = tuple[dict[str, Any], str, int]


def _up(options: argparse.Namespace) -> Answer:
    if not options.json:
        print(f"{options.hosts} hosts{', and Ray on them' if options.ray else ''} ...", file=sys.stderr, flush=True)
    lab = Lab(options.hosts, options.cpus, options.ray, dict(options.env), options.dashboard)
    lab.up()
    hosts = [{"host": host.index, "address": host.address} for host in lab.hosts]
    answer = {"lab": lab.name, "address": lab.address, "hosts": hosts, "env": lab.env}
    return answer, _welcome(lab.name, lab.address if options.ray else "", len(hosts)), 0


def _welcome(name: str, address: str, num_hosts: int) -> str:
    """What a new lab is good for."""
    run = f"dltrain run job.yaml --address {address}" if address else "ip address"
    return "\n".join(
        [
            f"{name}: {num_hosts} hosts{f', Ray at {address}' if address else ''}",
            f"  on a host: python -m cluster.lab exec 0 -- {run}",
            "  away with it: python -m cluster.lab down",
        ]
    )


def _list(_: argparse.Namespace) -> Answer:
    labs = [_described(name) for name in all_networks()]
    text = "\n".join(line for lab in labs for line in _lines(lab))
    return {"labs": labs}, text or "no lab is up. Start one: python -m cluster.lab up", 0


def _described(name: str) -> dict[str, Any]:
    try:
        lab = Lab.attach(name)
    except LabUsageError:  # only its network is left
        return {"lab": name, "address": None, "owner": None, "hosts": []}
    hosts = [
        {"host": h.index, "address": h.address, "processes": len(h.pids()), **_cable(lab.network.cable(h.index))}
        for h in lab.hosts
    ]
    return {"lab": lab.name, "address": lab.address if lab.has_ray else None, "owner": lab.owner, "hosts": hosts}


def _cable(cable: Cable) -> dict[str, Any]:
    return {"cable": "whole" if cable.is_up else "cut", "mbit": cable.mbit}


def _lines(lab: Mapping[str, Any]) -> list[str]:
    """A lab as text: a line about it, and one for each host."""
    owner = f", ends with process {lab['owner']}" if lab["owner"] else ""
    ray = f", Ray at {lab['address']}" if lab["address"] else ""
    lines = [f"{lab['lab']}: {len(lab['hosts'])} hosts{ray}{owner}"]
    for host in lab["hosts"]:
        rate = f", {host['mbit']:g} Mbit/s" if host["mbit"] else ""
        lines.append(
            f"  host {host['host']}  {host['address']}  {host['processes']} processes, cable {host['cable']}{rate}"
        )
    return lines


def _exec(options: argparse.Namespace) -> Answer:
    lab, host = _lab_and_host(options)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise LabUsageError("which command? For example: python -m cluster.lab exec 0 -- ip address")
    # With --json what it prints is part of the answer.
    done = host.run(command, check=False, capture_output=options.json, text=True)
    answer = {"lab": lab.name, "host": host.index, "code": done.returncode, "out": done.stdout, "err": done.stderr}
    return answer, "", done.returncode


def _add(options: argparse.Namespace) -> Answer:
    lab = Lab.attach(options.lab)
    host = lab.add()
    answer = {"lab": lab.name, "host": host.index, "address": host.address}
    return answer, f"{lab.name}: host {host.index} at {host.address}", 0


def _down(options: argparse.Namespace) -> Answer:
    names = all_networks() if options.all else [options.lab] if options.lab else unowned()
    if len(names) > 1 and not options.all:
        raise LabUsageError(f"which lab? Up on this machine: {', '.join(names)}. Choose with --lab, or --all")
    found = [name for name in names if name in all_networks()]
    for name in names:
        take_down(name)
    return {"labs": found}, f"taken away: {', '.join(found)}" if found else "there was no lab to take away", 0


def _to_host(did: str, act: Callable[[Host, argparse.Namespace], None]) -> Callable[[argparse.Namespace], Answer]:
    """A verb that does one thing to one host."""

    def verb(options: argparse.Namespace) -> Answer:
        lab, host = _lab_and_host(options)
        act(host, options)
        return {"lab": lab.name, "host": host.index, "did": did}, f"{lab.name}: host {host.index}: {did}", 0

    return verb


def _lab_and_host(options: argparse.Namespace) -> tuple[Lab, Host]:
    lab = Lab.attach(options.lab)
    for host in lab.hosts:
        if host.index == options.host:
            return lab, host
    raise LabUsageError(f"no host {options.host}: {lab.name} has {', '.join(str(h.index) for h in lab.hosts)}")


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return number


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m cluster.lab", description=_ABOUT, epilog=_ENDS, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")

    def verb(name: str, what: str, act: Callable[[argparse.Namespace], Answer], host: bool = False, **more: Any) -> Any:
        added = verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", **more)
        added.set_defaults(act=act)
        if name not in ("up", "list"):
            added.add_argument("--lab", metavar="NAME", help="which one, when several are up")
        added.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
        if host:
            added.add_argument("host", type=_at_least(0), metavar="HOST", help="its number, as `list` shows it")
        return added

    up = verb("up", "start a lab; it stays until `down`. --json shows Ray's token too", _up)
    up.add_argument("--hosts", type=_at_least(1), default=3, metavar="N", help="how many (default: %(default)s)")
    up.add_argument("--cpus", type=_at_least(0), default=1, metavar="N", help="slots of each (default: %(default)s)")
    up.add_argument("--no-ray", dest="ray", action="store_false", help="the network alone")
    up.add_argument("--dashboard", action="store_true", help="with Ray's job API, at port 8265 of host 0")
    up.add_argument(
        "--env", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="for Ray and `exec`"
    )
    verb("list", "show the labs that are up, and the state of their hosts", _list)
    run = verb("exec", "run a command on a host; its exit code is this one's", _exec, host=True)
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="and its arguments")
    verb("cut", "pull a host's cable; it keeps its address and talks to itself", _CUT, host=True)
    verb("mend", "put a host's cable back", _MEND, host=True, aliases=["join"])
    slow = verb("slow", "limit the rate of a host's cable, both ways", _SLOW, host=True)
    slow.add_argument("--mbit", type=float, required=True, help="Mbit/s; 0 takes the limit away")
    slow.add_argument(
        "--latency-ms", type=float, default=50.0, metavar="MS", help="longest wait in its queue (default: %(default)s)"
    )
    verb("kill", "end all processes of a host at once, as a loss of power would", _KILL, host=True)
    verb("start", "start Ray on a killed host again", _START, host=True)
    verb("add", "one more host joins", _add)
    verb("down", "take the lab away", _down).add_argument("--all", action="store_true", help="every one there is")
    return parser


_CUT = _to_host("its cable is cut", lambda host, _: host.cut())
_MEND = _to_host("its cable is whole", lambda host, _: host.join())
_SLOW = _to_host("its cable's rate is set", lambda host, options: host.slow(options.mbit, options.latency_ms))
_KILL = _to_host("all its processes are ended", lambda host, _: host.kill())
_START = _to_host("Ray is started", lambda host, _: host.start())
