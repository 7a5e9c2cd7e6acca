"""Tries launch configurations of attention and decoding on the GPU at hand and writes the best ones as a table.

    PYTHONPATH=kernels python -m benchmarks.tune --out FILE [--op NAME] [--head-dim N] [--seconds N]

For each operator, head_dim and dtype every candidate is verified by the error rule on all workloads, then timed on them. A
candidate's score is the geometric mean of its times, each relative to the rule's. The best one enters the table if it beats the
rule by more than two timings of the rule differ; otherwise the rule stays. The table says what it was measured with, and is
used where a user asks for it: `LLAVA15_TUNED=FILE` (`llava15_kernels/tuned.py`).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import llava15_kernels
from llava15_kernels import tuned
from llava15_kernels._dispatch import architecture
from llava15_kernels.flash_attn import FlashConfig
from llava15_kernels.flash_decode import Plan

from .cases import Checker, cases
from .rows import environment, output_file, positive, write_document
from .timing import device_time

Config = dict[str, int]


@dataclass(frozen=True)
class Sweep:
    """What is tried for one operator and head_dim, on the cases of these names."""

    op: str
    head_dim: int
    workloads: tuple[str, ...]
    choices: dict[str, tuple[int, ...]]
    chosen: Callable[[tuple[Any, ...], str], Config]
    """The configuration that the launcher would choose for these inputs on this architecture."""

    def candidates(self) -> Iterator[Config]:
        for values in product(*self.choices.values()):
            yield dict(zip(self.choices, values, strict=True))


def _attention_config(inputs: tuple[Any, ...], arch: str) -> Config:
    q = inputs[0]
    return asdict(FlashConfig.choose(q.shape[-1], q.dtype, arch))


def _decode_config(inputs: tuple[Any, ...], arch: str) -> Config:
    q, k_cache = inputs[:2]
    plan = asdict(Plan.choose(q, k_cache, 0))
    # The plan holds what follows from the waves; they are what the table or the rule says.
    found = tuned.tuned("flash_decode", (q.shape[-1], q.dtype, arch))
    return {name: plan[name] for name in ("block_n", "num_warps", "num_stages")} | {"waves": found["waves"] if found else 2}


ATTENTION_CHOICES = {
    "descriptors": (1, 0),
    "block_m": (64, 128),
    "block_n": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
DECODE_CHOICES = {"block_n": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4), "waves": (1, 2, 4)}
SWEEPS = [
    Sweep("flash_attn_varlen", 64, ("vision 1601", "vision 4x1601", "vision 6401"), ATTENTION_CHOICES, _attention_config),
    Sweep("flash_attn_varlen", 128, ("causal 1024", "causal 4096", "causal 4x1024"), ATTENTION_CHOICES, _attention_config),
    Sweep(
        "flash_decode", 128, ("batch 1, 1024", "batch 1, 8192", "batch 1, 32768", "batch 16, 8192"), DECODE_CHOICES,
        _decode_config,
    ),
]  # fmt: skip


class NotAsked(Exception):
    """The launcher does not take its configuration from the table."""


class Tuner:
    """One sweep in one dtype."""

    def __init__(self, sweep: Sweep, device: torch.device, dtype: torch.dtype, end: float, dry: bool) -> None:
        self.sweep, self.device, self.end, self.dry = sweep, device, end, dry
        self.arch = architecture(device)
        table = {case.name: case for case in cases(tiny=dry)}
        self.checkers = {name: Checker(table[name], device, dtype) for name in sweep.workloads}
        inputs = next(iter(self.checkers.values())).inputs
        self.key = (inputs[0].shape[-1], dtype, self.arch)
        with tuned.overridden({}):
            self.rule = sweep.chosen(inputs, self.arch)

    def measure(self, config: Config) -> dict[str, float]:
        """workload -> median in microseconds. Raises AssertionError where a result is wrong."""
        with tuned.overridden({(self.sweep.op, self.key): config}):
            times = {}
            for name, checker in self.checkers.items():
                if self.sweep.chosen(checker.inputs, self.arch) != config:
                    raise NotAsked(f"{self.sweep.op}: the launcher does not ask the table of configurations")
                checker.check_ours()
                times[name] = device_time(checker.ours, self.device, 0.001 if self.dry else 0.06).p50
            return times

    def best(self, log: Callable[[str], None]) -> dict[str, Any] | None:
        """The table's entry, or None where the rule stays."""
        base, again = self.measure(self.rule), self.measure(self.rule)
        noise = max(abs(again[name] / base[name] - 1) for name in base)
        best, best_score, tried = None, 1.0, 0
        candidates = [config for config in self.sweep.candidates() if config != self.rule]
        # The rule's neighbours first: time may be too short for all.
        candidates.sort(key=lambda config: sum(config[name] != self.rule[name] for name in config))
        candidates = candidates[:2] if self.dry else candidates
        for config in track(candidates, "trying", console=Console(stderr=True), transient=True):
            if time.monotonic() > self.end:
                log(f"  out of time after {tried} of {len(candidates)} candidates")
                break
            try:
                times = self.measure(config)
            except NotAsked:
                raise
            except Exception as error:  # too much shared memory, say
                log(f"  {config}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
                if not self.dry:
                    torch.cuda.synchronize()  # raises where the device is lost
                continue
            tried += 1
            score = math.prod(times[name] / base[name] for name in base) ** (1 / len(base))
            log(f"  {config}: {score:.3f} of the rule's time")
            if score < best_score:
                best, best_score, best_times = config, score, times
        log(f"  the rule {self.rule} differs from itself by {noise:.1%}; best {best}: {best_score:.3f}")
        if best is None or best_score >= 1 - noise:
            return None
        head_dim, dtype, arch = self.key
        return {
            "op": self.sweep.op,
            "head_dim": head_dim,
            "dtype": str(dtype).removeprefix("torch."),
            "architecture": arch,
            "config": best,
            "evidence": {
                "rule": self.rule,
                "relative_time": round(best_score, 4),
                "noise": round(noise, 4),
                "candidates_tried": tried,
                "us": {name: {"rule": round(base[name], 2), "tuned": round(best_times[name], 2)} for name in base},
            },
        }


def main(argv: list[str] | None = None) -> int:
    """Status 0: the table is written; 1: a launcher takes no configuration from a table; 2: no GPU; 130: stopped by hand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description="Tries launch configurations on the GPU at hand, verifies each before timing it, and writes the best ones.",
    )
    parser.add_argument("--out", type=output_file, required=True, metavar="FILE", help="The table is written to this file.")
    parser.add_argument("--op", choices=list(tuned.FIELDS), help="Only this operator.")
    parser.add_argument("--head-dim", type=positive, metavar="N", help="Only this width of a head.")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], help="Only this dtype.")
    parser.add_argument(
        "--seconds", type=float, default=500, metavar="N", help="The time box, shared by the sweeps. By default 500."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Tries two candidates each on the CPU at tiny sizes; the table cannot be used."
    )
    parser.add_argument(
        "--commit", metavar="HASH", help="The commit that the table names; by default git's, or what the file COMMIT says."
    )
    arguments = parser.parse_args(argv)
    if not (arguments.dry_run or torch.cuda.is_available()):
        print("This machine has no GPU that torch can use; --dry-run tries everything on the CPU.", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    begin = time.monotonic()

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    jobs = [
        (sweep, dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for sweep in SWEEPS
        if arguments.op in (None, sweep.op)
        and arguments.head_dim in (None, sweep.head_dim)
        and arguments.dtype in (None, str(dtype).removeprefix("torch."))
        # Triton's interpreter has no working bfloat16 arithmetic.
        and not (llava15_kernels.INTERPRETED and dtype == torch.bfloat16)
    ]
    if not jobs:
        parser.error("nothing is tuned for this operator, width and dtype")
    document: dict[str, Any] = {
        "format": 1,
        "measured": {**environment(arguments.commit), "dry_run": arguments.dry_run},
        "configurations": [],
    }
    status = 0
    with torch.no_grad():
        for index, (sweep, dtype) in enumerate(jobs):
            left = begin + arguments.seconds - time.monotonic()
            log(f"{sweep.op}, head_dim {sweep.head_dim}, {dtype}: {left:.0f} s are left")
            if left <= 0:
                break
            tuner = Tuner(sweep, device, dtype, time.monotonic() + left / (len(jobs) - index), arguments.dry_run)
            try:
                if entry := tuner.best(log):
                    document["configurations"].append(entry)
            except KeyboardInterrupt:
                log(f"stopped by hand in sweep {index + 1} of {len(jobs)}")
                status = 130
            except NotAsked as error:
                log(str(error))
                status = 1
            # After each sweep, so that a run that is cut off leaves what it has found.
            write_document(arguments.out, document)
            if status == 130:
                break
    log(f"{len(document['configurations'])} configurations in {arguments.out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
