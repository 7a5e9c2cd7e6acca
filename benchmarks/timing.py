"""How a call is timed, in one place.

| function      | what it gives                                              | where                         |
|---------------|------------------------------------------------------------|-------------------------------|
| `device_time` | the device's time of one call, cold L2                     | events; a wall clock on a CPU |
| `graph_time`  | the device's time of one call inside a CUDA graph of many  | GPU                           |
| `host_times`  | what a call costs the host: Python, dispatcher, launch     | anywhere                      |
| `EventTimer`  | as `device_time`, plugged into pytest-benchmark            | GPU                           |

All give the 10%, 50% and 90% quantiles of repeated measurements in microseconds, after warming up.

`device_time` holds the device back with a spinning kernel until the host has queued the flush, both events and the whole call,
so that the interval between the events holds no gap in which the device waits for Python. A repetition in which the device got
there first is dropped and the hold doubled; a call that itself waits for the device cannot be held back, and its repetitions
are counted in `host_late`. The L2 is flushed by writing a buffer four times its size: its dirty lines are evicted during the
call, as those of a preceding layer would be, and the call's own last lines stay behind.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Quantiles in microseconds, and how they came about."""

    p10: float
    p50: float
    p90: float
    repetitions: int
    clock: str
    host_late: int = 0

    @classmethod
    def of(cls, samples: list[float], clock: str, host_late: int = 0) -> Timing:
        """From microseconds."""
        tenths = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
        return cls(tenths[0], tenths[4], tenths[8], len(samples), clock, host_late)

    def fields(self) -> dict[str, Any]:
        """As they stand in a row."""
        return {
            "p10_us": round(self.p10, 3),
            "p50_us": round(self.p50, 3),
            "p90_us": round(self.p90, 3),
            "repetitions": self.repetitions,
            "clock": self.clock,
            "host_late": self.host_late,
        }


MOST_REPETITIONS, FEWEST_REPETITIONS = 200, 10
LONGEST_HOLD = 0.02
"""Seconds. A host that needs longer to queue one call is waiting for the device inside it."""


def device_time(call: Call, device: torch.device, budget: float = 0.4) -> Timing:
    """The device's time of one `call`, in about `budget` seconds; on a CPU the wall clock's."""
    call()
    if device.type != "cuda":
        return _wall_time(call, budget)
    with torch.cuda.device(device):
        return _event_time(call, device, budget)


def _event_time(call: Call, device: torch.device, budget: float) -> Timing:
    flush, cycles = _flush_buffer(device), _cycles_per_second(device)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(3):
        call()
    hold = 2 * (time.perf_counter() - begin) / 3 + 2e-4
    torch.cuda.synchronize()

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    samples: list[float] = []
    late, begin = 0, time.perf_counter()
    while len(samples) < MOST_REPETITIONS:
        torch.cuda._sleep(int(min(hold, LONGEST_HOLD) * cycles))
        flush.zero_()
        start.record()
        call()
        end.record()
        was_late = start.query()
        torch.cuda.synchronize()
        if was_late and hold < LONGEST_HOLD:
            hold *= 2
            continue
        late += was_late
        samples.append(1e3 * start.elapsed_time(end))
        if time.perf_counter() - begin > budget and len(samples) >= FEWEST_REPETITIONS:
            break
    return Timing.of(samples, "CUDA events, cold L2", late)


def _wall_time(call: Call, budget: float) -> Timing:
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 2 or (len(samples) < MOST_REPETITIONS and time.perf_counter() - begin < budget):
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    return Timing.of(samples, "perf_counter")


def graph_time(
    call: Call, device: torch.device, inner: int = 20, budget: float = 0.2, check: Callable[[Any], None] = lambda outputs: None
) -> Timing:
    """The device's time of one `call` in a CUDA graph of `inner` calls, warm L2: launch gaps count, the host does not.

    `check` is given what the last call leaves when the graph is replayed, and may raise.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # what Python collects may unload a module of kernels, which no capture survives
        try:
            with torch.cuda.graph(graph):
                for _ in range(inner):
                    outputs = call()
        finally:
            gc.enable()
        graph.replay()
        torch.cuda.synchronize()
        check(outputs)
        whole = device_time(graph.replay, device, budget)
    clock = f"CUDA events, graph of {inner} calls, warm L2"
    return Timing(whole.p10 / inner, whole.p50 / inner, whole.p90 / inner, whole.repetitions, clock, whole.host_late)


def host_times(calls: dict[str, Call], device: torch.device, rounds: int = 30, batch: int = 50) -> dict[str, Timing]:
    """What one of each call costs the host, measured in turns so that a ratio of two is not a drift of the machine.

    A batch waits for nothing and is small enough for the device's queue; before the next one the device has caught up.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(batch):
                call()
            if turn:  # the first warms up
                samples[name].append(1e6 * (time.perf_counter() - start) / batch)
    return {name: Timing.of(found, f"perf_counter, {batch} calls without waiting") for name, found in samples.items()}


class EventTimer:
    """pytest-benchmark's timer for a GPU: the moments it returns are events, and their difference is in seconds.

    `prepare` goes before each call: it holds the device back and flushes the L2.

    Attributes:
        late: calls before which the device did not wait for the host; their times hold the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.late, self.hold = device, 0, 5e-4

    def prepare(self) -> None:
        torch.cuda._sleep(int(self.hold * _cycles_per_second(self.device)))
        _flush_buffer(self.device).zero_()

    def __call__(self) -> Moment:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Moment(event, self)


@dataclass(frozen=True)
class Moment:
    event: torch.cuda.Event
    timer: EventTimer

    def __sub__(self, earlier: Moment) -> float:
        if earlier.event.query():
            self.timer.late += 1
            self.timer.hold = min(2 * self.timer.hold, LONGEST_HOLD)
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


@cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    cached = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
    return torch.empty(4 * cached, dtype=torch.int8, device=device)


@cache
def _cycles_per_second(device: torch.device) -> float:
    """Of the spinning kernel."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cycles = 2_000_000
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return 1e3 * cycles / start.elapsed_time(end)
