"""Where a rank is: the environment on one and on several nodes, with and without GPUs."""

from __future__ import annotations

from dltrain.running.agent import SlotInfo
from dltrain.running.group import rank_environment
from dltrain.running.rendezvous import interface_of


def info(node: str, gpu: str | None = None) -> SlotInfo:
    return SlotInfo(node, f"10.0.0.{ord(node)}", "eth1", (gpu,) if gpu else (), 1)


def test_local_ranks_count_within_a_node() -> None:
    infos = [info("a", "0"), info("a", "3"), info("b", "1"), info("b", "2")]
    found = [rank_environment(infos, rank, 5000) for rank in range(4)]
    assert [e["LOCAL_RANK"] for e in found] == ["0", "1", "0", "1"]
    assert [e["LOCAL_WORLD_SIZE"] for e in found] == ["2"] * 4
    # Every worker sees its node's GPUs, so that its local rank names one of them.
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["0,3", "0,3", "1,2", "1,2"]
    assert {e["MASTER_ADDR"] for e in found} == {infos[0].address}
    assert {(e["MASTER_PORT"], e["WORLD_SIZE"]) for e in found} == {("5000", "4")}
    assert {(e["GLOO_SOCKET_IFNAME"], e["NCCL_SOCKET_IFNAME"]) for e in found} == {("eth1", "eth1")}


def test_identical_slots_have_ranks_of_their_own() -> None:
    infos = [info("a"), info("a"), info("a")]
    assert [rank_environment(infos, rank, 1)["LOCAL_RANK"] for rank in range(3)] == ["0", "1", "2"]
    assert "CUDA_VISIBLE_DEVICES" not in rank_environment(infos, 0, 1)


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
