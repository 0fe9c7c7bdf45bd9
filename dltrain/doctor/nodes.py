"""Judges the nodes of a cluster together: the same software, the same time, and all in reach of each other.

judge_same({"10.0.0.1": facts, ...}, mine)
judge_clocks({"10.0.0.1": Offset(0.0, 0.001), ...})
judge_reach({("10.0.0.1", "10.0.0.2"): "", ...})        # "" or why it can't be connected to

Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dltrain.doctor.finding import Finding, at, fail, ok, skip, warn

__all__ = ["Offset", "judge_clocks", "judge_loopback", "judge_reach", "judge_same", "judge_shared", "judge_source"]

# state.json of a run whose driver's clock is so far away is taken for a dead one's (running.rundir).
_CLOCK_GOOD, _CLOCK_LEAST = 2.0, 15.0


@dataclass(frozen=True)
class Offset:
    """A clock against the head's: seconds that it is ahead, give or take `error`."""

    seconds: float
    error: float

    def __sub__(self, other: Offset) -> Offset:
        return Offset(self.seconds - other.seconds, self.error + other.error)

    @property
    def least(self) -> float:
        """How far away it is at least."""
        return max(0.0, abs(self.seconds) - self.error)

    def __str__(self) -> str:
        return f"{self.seconds:+.3f} s (± {self.error:.3f})"


def judge_same(nodes: Mapping[str, Mapping[str, str | None]]) -> list[Finding]:
    """Whether all have the same versions.

    Args:
        nodes: place -> Python or package -> version; None where it is missing.
    """
    names = list(dict.fromkeys(name for versions in nodes.values() for name in versions))
    told = [text for name in names if (text := _odd({p: v.get(name) for p, v in nodes.items()}, name))]
    if not told:
        one = next(iter(nodes.values()), {})
        return [ok("same versions", f"on {len(nodes)} machines: {', '.join(f'{n} {v}' for n, v in one.items())}")]
    why = "what one process pickles another must read, and all ranks must compute alike"
    todo = "use one image, or `pip install -c constraints.txt dltrain` on every node"
    return [fail("same versions", text, why, todo) for text in told]


def judge_source(nodes: Mapping[str, str]) -> list[Finding]:
    """Whether all have the same source of dltrain, by its digest."""
    text = _odd(nodes, "the source of dltrain")
    if not text:
        return [ok("same source", f"of dltrain, on {len(nodes)} machines")]
    why = "driver and workers must be of one source, whatever its version says"
    todo = "install the same dltrain everywhere, or use one image"
    return [fail("same source", text, why, todo)]


def _odd(values: Mapping[str, str | None], name: str) -> str:
    """Who differs from most others; empty when nobody does."""
    (usual, _), *_ = Counter(values.values()).most_common(1)
    others = ", ".join(f"{place}: {value or 'none'}" for place, value in values.items() if value != usual)
    return f"{name} is {usual or 'missing'} on most, but {others}" if others else ""


def judge_clocks(offsets: Mapping[str, Offset]) -> list[Finding]:
    """Whether the clocks agree with the head's."""
    found = []
    for place, offset in offsets.items():
        if offset.least > _CLOCK_GOOD:
            make = fail if offset.least > _CLOCK_LEAST else warn
            why = "a live run looks lost to who reads it with another clock, S3 refuses requests, logs are out of order"
            todo = "run chrony or systemd-timesyncd on every node (`timedatectl set-ntp true`)"
            found += at(place, [make("clock", f"{offset} from the head's", why, todo)])
    if found or not offsets:
        return found
    worst = max(offsets, key=lambda place: abs(offsets[place].seconds))
    return [ok("clocks", f"{len(offsets)} nodes; furthest from the head's: {worst} by {offsets[worst]}")]


def judge_loopback(addresses: Sequence[str]) -> list[Finding]:
    """Whether the nodes are known by addresses that others can use."""
    loops = [address for address in addresses if address.startswith("127.") or address == "::1"]
    if len(addresses) < 2 or not loops:
        return []
    why = "the other nodes find themselves under that address"
    todo = "start Ray there with --node-ip-address=ADDRESS, one that the other nodes reach"
    return [fail("node address", f"Ray knows a node by {address}", why, todo) for address in loops]


def judge_reach(tries: Mapping[tuple[str, str], str]) -> list[Finding]:
    """Whether a port chosen at random on each node is in reach of all the others.

    Args:
        tries: (from, to) -> "" or why it can't be connected to.
    """
    bad = {pair: reason for pair, reason in tries.items() if reason}
    if not tries:
        return [skip("node to node", "there is one node")]
    if not bad:
        return [ok("node to node", f"{len(tries)} connections between the nodes' own addresses, on random ports")]
    targets = Counter(there for _, there in bad)
    found = []
    for target, count in targets.most_common():
        (source, _), reason = next((pair, reason) for pair, reason in bad.items() if pair[1] == target)
        others = f" and from {count - 1} more" if count > 1 else ""
        found.append(
            fail(
                "node to node",
                f"{target} can't be reached from {source}{others}: {reason}",
                "workers meet at a random port of rank 0's node, and then connect to each other",
                "let the nodes reach each other on all TCP ports (security group, firewall, NetworkPolicy)",
            )
        )
    return found


def judge_shared(url: str, sees: Mapping[str, bool]) -> list[Finding]:
    """Whether all nodes see the same run directory.

    Args:
        sees: node -> whether it saw what this machine wrote.
    """
    blind = [place for place, seen in sees.items() if not seen]
    if not blind:
        return [ok("shared run directory", f"all nodes see what was written to {url}")] if sees else []
    return [
        fail(
            "shared run directory",
            f"{', '.join(blind)}: what this machine writes to {url} is not there",
            "workers on that node would write their part of each checkpoint to its own disk: it is never complete",
            "set `runs` to object storage (s3://...) or to a directory that all nodes mount",
        )
    ]
