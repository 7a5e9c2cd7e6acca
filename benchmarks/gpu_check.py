"""Everything that only a GPU can show, in one command with a time box.

    PYTHONPATH=kernels python -m benchmarks.gpu_check --out DIR

In order of value: the kernels' tests that need a GPU; the ceilings (a device-to-device copy, a large matrix product); a token
of the 4B and the 8B against sdpa; the tests of `generate` with real graphs; each kernel at the model's shapes in bfloat16
against torch; what a call costs the host; tiny kernels in CUDA graphs; an answer about an image; what else decodes; other
answers; the competitors that have to be compiled; float16; the other kernel tests. Competitors that are not installed are taken
from a folder of wheels (`--wheels`). Each finished measurement is a line of `DIR/gpu_check.jsonl` at once, so that a run which
is cut off still counts, and `--resume` goes on where it stopped. Another run adds to the file.

A section is a function that yields `Item`s, registered with `@section`: nothing else has to know of it.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import llava15_kernels
from llava15_kernels._dispatch import default_backend

from .cases import Case, Checker, Provider, Unavailable, cases, plain
from .host_time import host_rows, token_row
from .rows import ROOT, Rows, environment, output_folder, positive_seconds
from .timing import Call, Timing, device_time, graph_time

GRACE = 20
"""Seconds after which a run that does not come back, in a hung kernel say, is ended."""


class OutOfTime(Exception):
    """The time box is full."""


class DeviceLost(Exception):
    """The device answers with errors only: another process has to go on."""


@dataclass(frozen=True)
class Item:
    """One entry of the list: finished as a whole, or run again by `--resume`."""

    name: str
    run: Callable[[], None]
    seconds: float = 3.0
    """Left in the time box for it to be begun."""


class Run:
    """What the sections share: device, rows, time box, ceilings."""

    def __init__(self, rows: Rows | None, device: torch.device, seconds: float) -> None:
        self.rows, self.device = rows, device
        self.end = time.monotonic() + seconds
        self.dry = device.type != "cuda"
        self.item = ""

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, kind: str, **row: Any) -> None:
        self.rows.add(kind=kind, item=self.item, dry_run=self.dry, **row)

    def failures(self) -> list[str]:
        """The items that found something wrong, those that a resumed run had before it included."""
        return sorted({row["item"] for row in self.rows.rows if is_failure(row)})

    def backend(self) -> str:
        """What ours are on this device."""
        return default_backend(self.device) + (", interpreted" if llava15_kernels.INTERPRETED else "")

    def dtypes(self) -> list[torch.dtype]:
        """Triton's interpreter has no working bfloat16 arithmetic."""
        return [torch.float16] if llava15_kernels.INTERPRETED else [torch.bfloat16, torch.float16]

    def budget(self) -> float:
        """Seconds for one timing."""
        return 0.002 if self.dry else 0.3

    def ceiling(self, unit: str, dtype: torch.dtype) -> float | None:
        """What the device reaches in this run, in GB/s or TFLOP/s; None where there is no device."""
        if self.dry:
            return None
        for row in self.rows.rows:
            if row["kind"] == "ceiling" and row["unit"] == unit and row["dtype"] in (name_of(dtype), "any"):
                return row["value"]
        measure_ceiling(self, unit, dtype)
        return self.ceiling(unit, dtype)


def is_failure(row: dict[str, Any]) -> bool:
    """What a competitor cannot do is none, and neither is a time box that is full."""
    if row["kind"] == "time":
        return row["provider"] == "ours" and not row.get("verified")
    if row["kind"] == "generate":
        return row["status"] == "wrong" or (row["provider"].startswith("patched") and not row.get("verified"))
    if row["kind"] == "tests":
        return bool(row["failing"]) or row["status"] not in (0, 5, None)  # 5: nothing is selected
    return row["kind"] == "item" and row["status"] not in ("done", "out of time")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SECTIONS: dict[str, Callable[[Run], Iterable[Item]]] = {}
"""In order of value."""


def section(name: str) -> Callable[[Callable[[Run], Iterable[Item]]], Callable[[Run], Iterable[Item]]]:
    def register(function: Callable[[Run], Iterable[Item]]) -> Callable[[Run], Iterable[Item]]:
        SECTIONS[name] = function
        return function

    return register


# --- tests


@section("tests")
def gated_tests(run: Run) -> Iterator[Item]:
    yield Item("only with a GPU", lambda: run_tests(run, ["tests/kernels"], "gpu", 0.35), seconds=20)


GENERATE_TESTS = [f"tests/fast/test_{name}.py" for name in ("gpu", "graphs", "loop")]
"""On a CPU they have stand-ins for graphs and for a late end, or are skipped."""


OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>PASSED|FAILED|SKIPPED|ERROR) (?P<of>.+::.+?)|"  # as pytest-xdist prints it
    r"(?P<test>.+::.+?) (?P<last>PASSED|FAILED|SKIPPED|ERROR)\b.*) *$"
)


LEAST = 20.0


def run_tests(run: Run, paths: list[str], marker: str, share: float) -> None:
    """pytest in a process of its own, given a share of the time that is left; it prints outcomes as they come."""
    limit = max(LEAST, share * run.left())
    environ = {key: value for key, value in os.environ.items() if run.dry or key != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    command = [sys.executable, "-m", "pytest", *paths, "-m", marker, "-v", "--tb=line", "-p", "no:cacheprovider"]
    # A file that cannot be collected, for want of a package say, must not stop the others.
    command += ["--continue-on-collection-errors", *(["--collect-only"] if run.dry else parallel())]
    with tempfile.TemporaryFile("w+") as output:
        # A group of its own, so that what pytest has started goes with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
        output.seek(0)
        text = output.read()
    found = [match.groupdict() for line in text.splitlines() if (match := OUTCOME.match(line))]
    outcomes = {row["test"] or row["of"]: row["last"] or row["first"] for row in found}
    failing = {name: "" for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")}
    failing |= dict(re.findall(r"^(?:FAILED|ERROR) (\S.*?) - (.*)$", text, re.M))
    counts = {name.lower(): list(outcomes.values()).count(name) for name in ("PASSED", "SKIPPED")} | {"failed": len(failing)}
    timed_out = status is None
    run.add(
        "tests", paths=paths, selection=marker, **counts, failing=failing, status=status, timed_out=timed_out,
        limit_s=round(limit),
    )  # fmt: skip
    run.rows.log(f"tests {' '.join(paths)} -m {marker!r}: {counts}, status {status}{', out of time' * timed_out}")
    for name, message in failing.items():
        run.rows.log(f"  FAILED {name}: {message}")
    if status not in (0, 1, 5) or (status == 1 and not failing):
        run.rows.log(text.strip()[-2000:])


def parallel() -> list[str]:
    """Compiling takes the time, so a few processes where the plugin for it is at hand."""
    try:
        import xdist  # noqa: F401
    except ImportError:
        return []
    # Each holds up to 8 GB for the exact attention of long sequences.
    return ["-n", str(min(6, os.cpu_count() or 1))]


# --- ceilings


@section("ceilings")
def ceilings(run: Run) -> Iterator[Item]:
    yield Item("copy", lambda: measure_ceiling(run, "GB/s", torch.bfloat16))
    for dtype in run.dtypes():
        yield Item(f"matmul {name_of(dtype)}", lambda dtype=dtype: measure_ceiling(run, "TFLOP/s", dtype))


def measure_ceiling(run: Run, unit: str, dtype: torch.dtype) -> None:
    if unit == "GB/s":
        source = torch.empty(2**12 if run.dry else 2**30, dtype=torch.int8, device=run.device).random_()
        target = torch.empty_like(source)
        work, what, of = 2 * source.numel(), f"copy of {source.numel()} bytes, read and written", "any"
        timing = device_time(lambda: target.copy_(source), run.device, run.budget())
    else:
        n = 32 if run.dry else 8192
        a, b = torch.randn(2, n, n, device=run.device).to(dtype)
        work, what, of = 2 * n**3, f"matrix product of {n} x {n} x {n}, random", name_of(dtype)
        timing = device_time(lambda: a @ b, run.device, run.budget())
    value = None if run.dry else round(rate(work, timing, unit), 1)
    run.add("ceiling", unit=unit, dtype=of, value=value, what=what, **timing.fields())
    run.rows.log(f"ceiling: {what}: {value} {unit}")


def rate(work: int, timing: Timing, unit: str) -> float:
    """Bytes as GB/s, operations as TFLOP/s, by the median."""
    return work / timing.p50 / {"GB/s": 1e3, "TFLOP/s": 1e6}[unit]


# --- whole answers


def answers(run: Run, config: str, shapes: list[tuple[int, ...]], providers: list[str], first_calls: bool = False) -> None:
    """Rows of `benchmarks.generate`; each shape is (image size, images, batch, context, new tokens)."""
    from . import generate  # transformers: the kernels are checked without it

    name, dtype = ("tiny", torch.float32) if run.dry else (config, torch.bfloat16)
    model = generate.build(name, run.device, dtype)
    for values in shapes:
        shape = generate.Shape(*values)
        if run.dry:
            shape = generate.Shape(min(shape.image_size, 56), shape.images, min(shape.batch, 2), 8, 4)
        lost = partial(give_up_if_lost, run)
        # Whole answers are too much for the interpreter.
        how = {"repeats": 2, "backend": "torch"} if run.dry else {"repeats": 3}
        how |= {"device": run.device, "failed": lost, "first_calls": first_calls}
        for row in generate.measure(model, name, shape, providers, **how):
            run.add("generate", **row)
            run.rows.log(f"{generate.describe(row)}{dry_mark(run)}")
            if run.left() <= 0:
                raise OutOfTime(f"{config}, {shape}: after {row['provider']}")


CONFIGS = ("4b", "8b")


@section("decode")
def decode(run: Run) -> Iterator[Item]:
    for config in CONFIGS:
        shapes = [(0, 0, 1, 1024, 64)]
        yield Item(
            f"{config} behind 1024 tokens",
            lambda config=config, shapes=shapes: answers(run, config, shapes, ["patched", "sdpa"]),
            seconds=45,
        )


@section("tests of generate")
def generate_tests(run: Run) -> Iterator[Item]:
    """After the first tokens, which are verified as well; all of them, for most have a stand-in only where there is no GPU."""
    yield Item("graphs, loop, caches", lambda: run_tests(run, GENERATE_TESTS, "", 0.25), seconds=45)


# --- kernels


def kernel_items(run: Run, dtype: torch.dtype, slow: bool) -> Iterator[Item]:
    for case in cases(tiny=run.dry):
        providers = case.slow_providers if slow else case.providers
        yield Item(
            f"{case.id} {name_of(dtype)}",
            lambda case=case, providers=providers: measure(run, case, dtype, providers),
            seconds=10 if slow else 4,
        )


@section("kernels")
def kernels(run: Run) -> Iterator[Item]:
    yield from kernel_items(run, run.dtypes()[0], slow=False)


def measure(run: Run, case: Case, dtype: torch.dtype, providers: dict[str, Provider]) -> None:
    """Ours, each provider, and a copy of as many bytes: verified, then timed. What is not verified is not timed."""
    torch.manual_seed(20260923)
    checker = Checker(case, run.device, dtype)
    about = {"kernel": case.kernel, "case": case.name, "shape": case.shape, "dtype": name_of(dtype)}
    everyone = {"ours": plain(case.ours), **providers}
    if not case.flops:
        everyone["copy"] = copy_of(checker)
    for name, provider in everyone.items():
        if run.left() <= 0:
            raise OutOfTime(f"{about['kernel']} {about['case']}: from {name} on")
        row = {**about, "provider": name}
        try:
            call = provider(*checker.inputs)
            if name == "ours":
                row["backend"] = run.backend()
                checker.check_ours()
            elif name != "copy":
                checker.check(call())
            timing = device_time(call, run.device, run.budget())
        except Unavailable as reason:
            run.add("time", **row, status=str(reason))  # "not installed", say
            continue
        except AssertionError as error:
            run.add("time", **row, status="wrong", verified=False, error=str(error))
            run.rows.log(f"WRONG {case.id} {about['dtype']} {name}: {error}")
            continue
        except Exception as error:
            give_up_if_lost(run, error)
            # A competitor that cannot run this is no failure; ours has to.
            verdict = {"status": "failed", "verified": False} if name == "ours" else {"status": "cannot run"}
            run.add("time", **row, **verdict, error=short(error))
            run.rows.log(f"{case.id} {about['dtype']} {name}: {verdict['status']}: {short(error)}")
            continue
        run.add("time", **row, status="ok", verified=True, **timing.fields(), **rates(run, case, checker, timing, dtype))
        log_timing(run, case.id, name, about["dtype"])


def copy_of(checker: Checker) -> Provider:
    """A copy that moves as many bytes as the case: a fairer ceiling than a large copy where a launch is felt."""

    def prepare(*inputs: Any) -> Call:
        device = checker.eager[0].device
        source = torch.empty(checker.traffic // 2, dtype=torch.int8, device=device).random_()
        target = torch.empty_like(source)
        assert torch.equal(target.copy_(source), source)
        return lambda: target.copy_(source)

    return prepare


def rates(run: Run, case: Case, checker: Checker, timing: Timing, dtype: torch.dtype) -> dict[str, Any]:
    row: dict[str, Any] = {"bytes": checker.traffic, "flops": case.flops or None}
    if run.dry:
        return row  # a CPU's, at sizes that nobody asked about
    unit = "TFLOP/s" if case.flops else "GB/s"
    value, ceiling = rate(case.flops or checker.traffic, timing, unit), run.ceiling(unit, dtype)
    return row | {"rate": round(value, 1), "unit": unit, "ceiling": ceiling, "percent": round(100 * value / ceiling, 1)}


def log_timing(run: Run, case: str, provider: str, dtype: str) -> None:
    row = run.rows.rows[-1]
    of = f"{row['rate']:9.1f} {row['unit']} ({row['percent']}%)" if "rate" in row else ""
    late = f", host late in {row['host_late']} of {row['repetitions']}" if row["host_late"] else ""
    run.rows.log(f"{case:45} {dtype:9} {provider:24} {row['p50_us']:10.2f} us {of}{late}{dry_mark(run)}")


def dry_mark(run: Run) -> str:
    return " (dry run: a CPU's, tiny)" if run.dry else ""


def short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def give_up_if_lost(run: Run, error: BaseException) -> None:
    """Raises DeviceLost where the error is that, or left the device unusable, as an illegal memory access does."""
    if isinstance(error, DeviceLost):
        raise error
    if run.dry:
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as lost:
        raise DeviceLost(short(error)) from lost


# --- the host, and graphs


@section("host")
def host(run: Run) -> Iterator[Item]:
    dtype = run.dtypes()[0]

    def measure_host() -> None:
        turns = {"rounds": 2, "batch": 2} if run.dry else {}
        for row in host_rows(run.device, dtype, **turns):
            run.add("host", dtype=name_of(dtype), provider="ours", **row)
            run.rows.log(
                f"{row['kernel']:36} host {row['public_us']:7.2f} us a call, {row['operator_us']:7.2f} of it the operator"
                f"{dry_mark(run)}"
            )

    def measure_token() -> None:
        row = token_row(run.device, **({"rounds": 2, "tokens": 4, "layers": 2} if run.dry else {"rounds": 40}))
        run.add("host_token", **row)
        run.rows.log(f"a replayed token of {row['layers']} layers: host {row['token_us']} us{dry_mark(run)}")

    yield Item("each public function", measure_host, seconds=5)
    yield Item("a replayed token", measure_token, seconds=5)


@section("graphs")
def graphs(run: Run) -> Iterator[Item]:
    dtype = run.dtypes()[0]

    def measure_graph(case: Case) -> None:
        checker = Checker(case, run.device, dtype)
        checker.check_ours()
        for name, provider in {"ours": plain(case.ours), "eager": case.providers["eager"]}.items():
            call = provider(*checker.inputs)
            checker.check(call())
            if run.dry:
                timing = device_time(call, run.device, run.budget())
            else:
                timing = graph_time(call, run.device, check=checker.check)
            run.add(
                "graph", kernel=case.kernel, case=case.name, shape=case.shape, dtype=name_of(dtype), provider=name,
                status="ok", verified=True, bytes=checker.traffic, **timing.fields(),
            )  # fmt: skip
            log_timing(run, f"{case.id} in a graph", name, name_of(dtype))

    for case in cases(tiny=run.dry):
        if case.tiny_launches:
            yield Item(case.id, lambda case=case: measure_graph(case))


@section("an image")
def about_an_image(run: Run) -> Iterator[Item]:
    """A large image and 64 tokens of text, 256 new ones; and what a first call waits for."""
    shapes, providers = [(1120, 1, 1, 64, 256)], ["patched", "sdpa"]
    for config in CONFIGS:
        yield Item(config, lambda config=config: answers(run, config, shapes, providers, first_calls=True), seconds=90)


@section("other ways")
def other_ways(run: Run) -> Iterator[Item]:
    """What else decodes: transformers' static cache with a compiled step and its eager attention, ours launch by launch."""
    shapes, providers = [(0, 0, 1, 1024, 64)], ["static + compile", "eager", "patched, no graph"]
    for config in CONFIGS:
        yield Item(config, lambda config=config: answers(run, config, shapes, providers, first_calls=True), seconds=150)


@section("answers")
def whole_answers(run: Run) -> Iterator[Item]:
    """A long context; images of other sizes; batches."""
    for title, shapes, seconds in (
        ("behind 8192 tokens", [(0, 0, 1, 8192, 64)], 40),
        ("about small, large and several images", [(560, 1, 1, 64, 16), (1568, 1, 1, 64, 16), (560, 4, 1, 64, 16)], 50),
        ("in batches", [(0, 0, 4, 1024, 64), (0, 0, 16, 1024, 64)], 60),
    ):
        for config in CONFIGS:
            yield Item(
                f"{config} {title}",
                lambda config=config, shapes=shapes: answers(run, config, shapes, ["patched", "sdpa"]),
                seconds=seconds,
            )


# --- the rest


@section("compiled")
def compiled_competitors(run: Run) -> Iterator[Item]:
    """Ours again beside them: how far two timings of one kernel lie apart."""
    yield from kernel_items(run, run.dtypes()[0], slow=True)


@section("float16")
def float16(run: Run) -> Iterator[Item]:
    for dtype in run.dtypes()[1:]:
        yield from kernel_items(run, dtype, slow=False)


@section("other tests")
def other_tests(run: Run) -> Iterator[Item]:
    yield Item("compiled kernels", lambda: run_tests(run, ["tests/kernels"], "not gpu", 1.0), seconds=40)


# --- the command


def items_of(run: Run, select: str) -> list[tuple[str, Item]]:
    named = [(f"{name}: {item.name}", item) for name, make in SECTIONS.items() for item in make(run)]
    return [(name, item) for name, item in named if select in name]


def run_all(run: Run, select: str) -> None:
    """Every item that is not in the file yet, until the time is up. Raises DeviceLost."""
    done = {row["item"] for row in run.rows.rows if row["kind"] == "item" and row["status"] != "out of time"}
    not_run = []
    for name, item in track(items_of(run, select), "checking", console=Console(stderr=True), transient=True):
        if name in done:
            continue
        if run.left() < item.seconds:
            not_run.append(name)
            continue
        run.item, begin = name, time.monotonic()

        def finish(status: str, error: str | None = None, begin: float = begin) -> None:
            run.add("item", status=status, error=error, seconds=round(time.monotonic() - begin, 2))
            if error:
                run.rows.log(f"{run.item}: {status}: {error}")

        try:
            item.run()
            finish("done")
        except OutOfTime as reason:
            finish("out of time", str(reason))
        except Exception as error:
            try:
                give_up_if_lost(run, error)
            except DeviceLost as lost:
                finish("device lost", str(lost))
                raise
            finish("wrong" if isinstance(error, AssertionError) else "failed", short(error))
        if not run.dry:
            torch.cuda.empty_cache()
    run.item = ""
    run.add("end", not_run=not_run, failures=run.failures(), seconds_left=round(run.left(), 1))
    if not_run:
        run.rows.log(f"no time was left for {len(not_run)} items, the first of them {not_run[0]}")


def watchdog(run: Run, seconds: float) -> threading.Timer:
    """Ends a process whose main thread does not come back."""

    def end() -> None:
        run.add("item", status="hung", seconds=None)
        run.rows.log(f"{run.item}: did not come back within the time box; ended")
        os._exit(3)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def main(argv: list[str] | None = None) -> int:
    """Status 0: all verified; 1: something is wrong or failed; 2: no GPU; 3: a kernel hung, or the device is lost; 130."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Tests and times every kernel on the GPU at hand, within a time box. Each finished measurement is appended "
        "at once to gpu_check.jsonl, and to gpu_check.log in words.",
    )
    parser.add_argument(
        "--out", type=output_folder, default=Path("gpu_check"), metavar="DIR", help="The folder of the two files."
    )
    parser.add_argument(
        "--seconds", type=positive_seconds, default=500.0, metavar="N",
        help="The time box. What does not fit is listed in the last row. By default 500.",
    )  # fmt: skip
    parser.add_argument(
        "--select", default="", metavar="SUBSTRING", help="Only the items whose name, as --list prints it, contains this."
    )
    parser.add_argument("--list", action="store_true", help="Prints the names of the items, in order, and stops.")
    parser.add_argument("--resume", action="store_true", help="Keeps the rows of the folder and skips what they have finished.")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="Runs every item on the CPU at tiny sizes, to find slips; its rows are marked and say nothing about a GPU.",
    )  # fmt: skip
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR",
        help="A folder of wheels of competitors in pure Python (liger-kernel) that are not installed; nothing is downloaded.",
    )  # fmt: skip
    parser.add_argument(
        "--commit", metavar="HASH", help="The commit that the rows name; by default git's, or what the file COMMIT says."
    )
    arguments = parser.parse_args(argv)

    if arguments.wheels and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels {arguments.wheels}: there are no wheels in this folder")
    if arguments.list:
        print("\n".join(name for name, _ in items_of(Run(None, torch.device("cuda"), 0), arguments.select)))
        return 0
    if not (arguments.dry_run or torch.cuda.is_available()):
        print("This machine has no GPU that torch can use; --dry-run tries everything on the CPU.", file=sys.stderr)
        return 2
    if arguments.dry_run and not llava15_kernels.INTERPRETED:
        # It is decided when the kernels are imported; without it their torch counterparts would be tried in their place.
        command = [sys.executable, "-m", "benchmarks.gpu_check", *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    if not items_of(Run(None, device, 0), arguments.select):
        parser.error(f"--select {arguments.select!r}: no item has this in its name; --list prints them")
    if arguments.wheels:
        sys.path += map(str, arguments.wheels.glob("*.whl"))  # last: what is installed goes before
    rows = Rows(arguments.out, "gpu_check", environment(arguments.commit), arguments.resume)
    run = Run(rows, device, arguments.seconds)
    rows.log(f"{rows.common}")
    timer = watchdog(run, arguments.seconds + GRACE)
    try:
        with torch.no_grad():
            run_all(run, arguments.select)
    except KeyboardInterrupt:
        rows.log(f"stopped by hand during {run.item}; {len(rows.rows)} rows are in {rows.file}")
        return 130
    except DeviceLost as error:
        rows.log(f"the device was lost during {run.item} ({error}); --resume goes on after it")
        return 3
    finally:
        timer.cancel()
    failures = run.failures()
    rows.log(f"{len(rows.rows)} rows in {rows.file}; wrong or failed: {', '.join(failures) or 'nothing'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
