"""Each kernel at the model's shapes against its competitors: verified, then timed by pytest-benchmark.

On a GPU a CUDA-event timer, cold L2, one call a round; without one tiny shapes and the wall clock, whose times say nothing
about a GPU. `extra_info` of a benchmark holds its quantiles, its rate and the share of the ceiling of the same run, and what a
call costs the host. A provider that breaks the error rule fails and is not timed.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, Checker, Provider, Unavailable, cases, plain
from benchmarks.gpu_check import Run, copy_of, give_up_if_lost, name_of, rates, short
from benchmarks.timing import EventTimer, Timing, host_times

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TIMER = EventTimer(DEVICE) if GPU else time.perf_counter
ROUNDS, WARMUP = (100, 5) if GPU else (5, 1)
CASES = {case.id: case for case in cases(tiny=not GPU)}


def contestants() -> list[Any]:
    return [
        pytest.param(id, name, id=f"{id} - {name}")
        for id, case in CASES.items()
        for name in ("ours", *case.providers, *case.slow_providers, *([] if case.flops else ["copy"]))
    ]


def provider_of(case: Case, name: str, checker: Checker) -> Provider:
    known = {"ours": plain(case.ours), "copy": copy_of(checker), **case.providers, **case.slow_providers}
    return known[name]


@pytest.fixture(scope="module")
def checker(run: Run, case: str) -> Checker:
    """The contestants of a case follow each other and share its inputs."""
    torch.manual_seed(20260923)
    with torch.no_grad():
        return Checker(CASES[case], DEVICE, run.dtypes()[0])


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize(("case", "name"), contestants(), scope="module")
@torch.no_grad()
def test_kernel(case: str, name: str, checker: Checker, benchmark: Any, run: Run) -> None:
    about, dtype = checker.case, run.dtypes()[0]
    try:
        call = provider_of(about, name, checker)(*checker.inputs)
        if name == "ours":
            checker.check_ours()
        elif name != "copy":
            checker.check(call())
    except Unavailable as reason:
        pytest.skip(str(reason))
    except AssertionError:
        raise
    except Exception as error:
        give_up_if_lost(run, error)
        if name == "ours":
            raise
        pytest.skip(f"cannot run: {short(error)}")

    benchmark.group = f"{case} {name_of(dtype)}"
    late = TIMER.late if GPU else 0
    benchmark.pedantic(call, setup=TIMER.prepare if GPU else None, rounds=ROUNDS, warmup_rounds=WARMUP)
    if benchmark.disabled:
        return
    late = TIMER.late - late if GPU else 0
    clock = "CUDA events, cold L2" if GPU else "perf_counter"
    timing = Timing.of([1e6 * taken for taken in benchmark.stats.stats.data], clock, late)
    host = host_times({name: call}, DEVICE, rounds=5, batch=20 if GPU else 2)[name]
    benchmark.extra_info.update(
        kernel=about.kernel, case=about.name, shape=about.shape, dtype=name_of(dtype), provider=name, verified=True,
        backend=run.backend() if name == "ours" else None, dry_run=run.dry,
        host_us=round(host.p50, 2), **timing.fields(), **rates(run, about, checker, timing, dtype),
    )  # fmt: skip
