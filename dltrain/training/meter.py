"""What a rank measures of a step beside its loss: seconds by phase, FLOPs of the model, bytes of gradients, memory.

clock = Phases(begin, device); clock.lap("data_wait"); ...; clock.end()
meter = Meter(modules, spec.engine, rank, num_ranks, device)
with meter.forward(micro.count, first=True): loss = ...
meter.step(global_count, num_micros)      # fields of a StepReport

It is on in every run: a step's worth of it costs some microseconds.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch

from dltrain.spec import EngineSpec

__all__ = ["Meter", "Phases", "peak_flops"]

# FLOPs/s of dense bf16, by what torch calls the device: NVIDIA's data sheets, which print twice that for sparse ones.
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
# After so many steps a forward pass is like those that follow, and is counted.
_COUNTED = 2
# A backward pass makes two products for each of the forward pass.
_PASSES = 3.0
# torch's memory statistics take a while to gather.
_RETRIES_EVERY = 50
_DEVICE_PHASES = ("h2d", "forward", "backward", "optimizer")


def peak_flops(device_name: str) -> float:
    """FLOPs/s that a device can make; 0 where that is not known."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), 0.0)


class Phases:
    """Seconds of one step by phase, which sum to its time.

    On a GPU work is only queued by the host: there the phases that compute are timed by events on the device, and
    what is left of the step's time is `other`.
    """

    def __init__(self, begin: float, device: torch.device) -> None:
        self.begin = self.now = begin
        self.seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"
        self._events: list[tuple[str, Any]] = []
        if self._cuda:
            self._mark("")

    def lap(self, phase: str, others: float = 0.0) -> None:
        """Books the time since the last lap; seconds of it that were spent waiting for `others` are not the phase's."""
        before, self.now = self.now, time.perf_counter()
        if self._cuda:
            self._mark(phase)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now - before - others
        if others:
            self.seconds["other"] = self.seconds.get("other", 0.0) + others

    def _mark(self, phase: str) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((phase, event))

    def end(self) -> None:
        """The step is over, and the device has done what was queued."""
        if not self._cuda:
            return
        torch.cuda.synchronize()
        spent = dict.fromkeys(_DEVICE_PHASES, 0.0)
        for (_, before), (phase, after) in zip(self._events, self._events[1:], strict=False):
            if phase in spent:
                spent[phase] += before.elapsed_time(after) / 1e3
        self.now = time.perf_counter()
        waited = self.seconds.get("data_wait", 0.0)
        rest = self.now - self.begin - waited - sum(spent.values())
        self.seconds = {**spent, "data_wait": waited, "other": max(0.0, rest)}


class Meter:
    """Measures one rank of one attempt.

    Args:
        rank: FLOPs are counted on rank 0 alone.
    """

    def __init__(
        self, modules: Sequence[torch.nn.Module], spec: EngineSpec, rank: int, num_ranks: int, device: torch.device
    ) -> None:
        self._cuda, self._rank = device.type == "cuda", rank
        size = 2 if spec.precision == "bf16" else 4
        trained = (p for module in modules for p in module.parameters() if p.requires_grad)
        elements = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
        self._gradient_bytes = elements * size if num_ranks > 1 else 0
        # From ZeRO 2 on every micro-batch's gradients are reduced, before that their sum.
        self._each_micro = spec.zero >= 2
        self._steps = self._retries = 0
        # of a unit of the loss: a row or a token
        self._flops = 0.0

    def forward(self, count: float, first: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a forward pass of a micro-batch with so many units, the `first` of its network in the step or not."""
        counted = first and count and not self._rank and self._steps == _COUNTED
        return self._counting(count) if counted else contextlib.nullcontext()

    @contextlib.contextmanager
    def _counting(self, count: float) -> Any:
        from dltrain.training.flops import counting_flops

        with counting_flops() as counter:
            yield
        self._flops += _PASSES * counter.get_total_flops() / count

    def step(self, global_count: float, num_micros: int) -> dict[str, Any]:
        """Of the step that has just been made, as fields of its report.

        Args:
            global_count: units of the global batch.
        """
        self._steps += 1
        return {
            "flops": self._flops * global_count,
            "gradient_bytes": self._gradient_bytes * (num_micros if self._each_micro else 1),
            "memory_bytes": self._memory(),
            "alloc_retries": self._new_retries(),
        }

    def _memory(self) -> int:
        if self._cuda:
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _new_retries(self) -> int:
        if not self._cuda or self._steps % _RETRIES_EVERY:
            return 0
        before, self._retries = self._retries, int(torch.cuda.memory_stats().get("num_alloc_retries", 0))
        return self._retries - before
