"""The GPU check finds slips on a CPU, refuses to time what is wrong, and leaves what it finished."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, rows, timing
from benchmarks.cases import Case, Checker, cases, plain
from benchmarks.gpu_check import DeviceLost, Item, OutOfTime, Run
from benchmarks.rows import Rows
from benchmarks.timing import Timing
from llava15_kernels import norms

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"device", "driver", "torch", "triton", "python", "commit", "sources"}


def check(folder, *arguments):
    """(status, rows) of a dry run in this process: the kernels in the interpreter."""
    file = folder / "gpu_check.jsonl"
    before = 0 if "--resume" in arguments else len(rows.read(file))
    status = gpu_check.main(["--dry-run", "--out", str(folder), *arguments])
    return status, rows.read(file)[before:]


def module(*arguments):
    """A run as users start it, without a word of the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": "kernels", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


@needs_no_gpu
def test_every_case_runs_and_every_row_stands_alone(tmp_path):
    status, found = check(tmp_path, "--select", "kernels: ")
    assert status == 0
    times = [row for row in found if row["kind"] == "time"]
    ours = [row for row in times if row["provider"] == "ours"]
    assert {(row["kernel"], row["case"]) for row in ours} == {(case.kernel, case.name) for case in cases()}
    assert all(row["verified"] and row["p10_us"] <= row["p50_us"] <= row["p90_us"] for row in ours)
    assert all(row["dry_run"] and row.keys() >= ENVIRONMENT for row in found)
    assert not any("rate" in row or "percent" in row for row in times), "a CPU's time is not a rate of a GPU"
    eager = [row for row in times if row["provider"].startswith("eager")]
    assert len(eager) == len(ours) and all(row["status"] == "ok" for row in eager)
    assert {row["status"] for row in times} >= {"ok", "not installed"}
    assert sum(row["kind"] == "item" and row["status"] == "done" for row in found) == len(ours)
    assert len((tmp_path / "gpu_check.log").read_text().splitlines()) > len(ours)


@needs_no_gpu
def test_compiled_competitors_run_from_an_uninstalled_checkout(tmp_path):
    result = module("benchmarks.gpu_check", "--dry-run", "--out", str(tmp_path), "--select", "compiled: ")
    assert result.returncode == 0, result.stderr[-2000:]
    found = [row for row in rows.read(tmp_path / "gpu_check.jsonl") if row.get("provider") not in (None, "ours", "copy")]
    assert {row["status"] for row in found} == {"ok"} and {row["dtype"] for row in found} == {"float16"}
    assert {row["provider"] for row in found} == {"FlexAttention", "torch.compile", "torch.compile, one image"}


@needs_no_gpu
def test_ceilings_host_and_graphs(tmp_path):
    found = [row for select in ("ceilings: ", "host: ", "graphs: ") for row in check(tmp_path, "--select", select)[1]]
    assert {row["unit"] for row in found if row["kind"] == "ceiling"} == {"GB/s", "TFLOP/s"}
    host = [row["kernel"] for row in found if row["kind"] == "host"]
    assert len(host) == 13 and "flash_attn_with_kvcache" in host
    graphs = [row for row in found if row["kind"] == "graph"]
    assert {row["provider"] for row in graphs} == {"ours", "eager"}
    assert {row["kernel"] for row in graphs} == {
        "rms_norm",
        "qk_norm_rope",
        "silu_and_mul",
        "flash_attn_with_kvcache",
        "decode_attention",
    }


@needs_no_gpu
def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    right = norms._launch

    def wrong(*args):
        y, total = right(*args)
        y[-1, -1] *= 1.05
        return y, total

    monkeypatch.setattr(norms, "_launch", wrong)
    status, found = check(tmp_path, "--select", "kernels: rms_norm 4096x4096 float16")
    assert status == 1
    ours, eager = (next(row for row in found if row.get("provider") == name) for name in ("ours", "eager"))
    assert ours["verified"] is False and "expected" in ours["error"] and "p50_us" not in ours
    assert eager["verified"] and "p50_us" in eager


@needs_no_gpu
def test_an_output_that_is_not_written_is_seen(tmp_path, monkeypatch):
    monkeypatch.undo()  # the buffers of the fixture: the check has to poison its own
    right = norms._launch

    def empty_handed(*args):
        y, total = right(*args)
        return torch.empty(y.shape, dtype=y.dtype), total

    monkeypatch.setattr(norms, "_launch", empty_handed)
    _, found = check(tmp_path, "--select", "kernels: rms_norm 4096x4096 float16")
    ours = next(row for row in found if row.get("provider") == "ours")
    assert ours["verified"] is False and "inf" in ours["error"]


@needs_no_gpu
def test_a_kernel_that_raises_is_a_failure_and_a_competitor_is_not(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of resources")

    def table(tiny=False):
        good, bad = (
            Case("k", name, "()", lambda device, dtype: (torch.ones(2, dtype=dtype),), torch.neg, torch.neg) for name in "ab"
        )
        return [
            Case(**{**vars(good), "providers": {"other": plain(broken)}}),
            Case(**{**vars(bad), "ours": broken}),
        ]

    monkeypatch.setattr(gpu_check, "cases", table)
    status, found = check(tmp_path, "--select", "kernels: k a")
    assert status == 0 and [row["status"] for row in found if row["kind"] == "time"] == ["ok", "cannot run", "ok"]
    status, found = check(tmp_path, "--select", "kernels: k b")
    assert status == 1 and [row["status"] for row in found if row["kind"] == "time"] == ["failed", "ok"]


def items(monkeypatch, **items):
    """The only section, of these items, each a function of the run."""

    def section(run):
        for name, body in items.items():
            yield Item(name, lambda body=body: body(run))

    monkeypatch.setattr(gpu_check, "SECTIONS", {"s": section})


def noted(run):
    run.add("note", text=run.item)


def test_what_was_finished_stays_when_stopped_and_resume_goes_on(tmp_path, monkeypatch):
    def stopped(run):
        raise KeyboardInterrupt

    items(monkeypatch, a=noted, b=stopped, c=noted)
    status, found = check(tmp_path)
    assert status == 130 and [row["kind"] for row in found] == ["note", "item"]

    with (tmp_path / "gpu_check.jsonl").open("a") as stream:
        stream.write('{"kind": "note", "cut o')
    items(monkeypatch, a=noted, b=noted, c=noted)
    status, found = check(tmp_path, "--resume")
    assert status == 0 and [row["text"] for row in found if row["kind"] == "note"] == ["s: a", "s: b", "s: c"]


def test_another_run_adds_and_what_ran_out_of_time_is_run_again(tmp_path, monkeypatch):
    def too_long(run):
        run.add("note", text="half done")
        raise OutOfTime("after half of it")

    items(monkeypatch, a=noted, b=too_long)
    _, first = check(tmp_path)
    items(monkeypatch, a=noted, b=noted)
    _, resumed = check(tmp_path, "--resume")
    assert [row["text"] for row in resumed if row["kind"] == "note"] == ["s: a", "half done", "s: b"]
    assert len({row["started"] for row in resumed}) == 1, "one run"
    _, another = check(tmp_path)
    assert rows.read(tmp_path / "gpu_check.jsonl") == [*resumed, *another] and len(another) == len(first)


@needs_no_gpu
def test_a_dry_run_tries_the_kernels(tmp_path):
    """Not their torch counterparts: without the interpreter it starts itself anew with it."""
    select = ["--select", "kernels: rms_norm 4096x4096 float16"]
    result = module("benchmarks.gpu_check", "--dry-run", "--out", str(tmp_path), *select)
    assert result.returncode == 0, result.stderr[-2000:]
    (ours,) = [row for row in rows.read(tmp_path / "gpu_check.jsonl") if row.get("provider") == "ours"]
    assert ours["backend"] == "triton, interpreted" and ours["verified"]


def test_after_a_lost_device_another_process_goes_on_behind_the_item(tmp_path, monkeypatch):
    def lost(run):
        raise DeviceLost("illegal memory access")

    items(monkeypatch, a=noted, b=lost, c=noted)
    assert check(tmp_path)[0] == 3
    status, found = check(tmp_path, "--resume")
    assert status == 1, "what the first process found is not forgotten"
    assert [row["item"] for row in found if row["kind"] == "item"] == ["s: a", "s: b", "s: c"]


def test_what_does_not_fit_into_the_time_is_listed(tmp_path, monkeypatch):
    items(monkeypatch, a=noted, b=noted)
    _, found = check(tmp_path, "--seconds", "1")
    assert found[-1]["kind"] == "end" and found[-1]["not_run"] == ["s: a", "s: b"]


def test_a_hung_kernel_is_ended(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    run = Run(Rows(tmp_path, "x", {}), torch.device("cpu"), 1)
    run.item = "s: a"
    gpu_check.watchdog(run, 0.01).join()
    assert ended == [3] and run.rows.rows[-1]["status"] == "hung" and run.rows.rows[-1]["item"] == "s: a"


@needs_no_gpu
def test_without_a_gpu_it_says_so(tmp_path):
    result = module("benchmarks.gpu_check", "--out", str(tmp_path / "none"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no GPU" in result.stderr
    assert not (tmp_path / "none").exists()


MISTAKES = {
    "--select nothing": "no item has this in its name",
    "--wheels tests": "no wheels",
    "--out README.md": "README.md is a file",
    "--seconds -3": "'-3' is not a positive number of seconds",
}


@needs_no_gpu
@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_clear_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        check(tmp_path / "out", *arguments.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in last and MISTAKES[arguments] in last
    assert not (tmp_path / "out").exists()


@needs_no_gpu
def test_competitors_come_from_wheels(tmp_path, monkeypatch):
    """Of a name that the table knows; the rows say which version it was."""
    source = (
        "import torch\n"
        "def liger_rms_norm(x, weight, eps):\n"
        "    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)\n"
    )
    with zipfile.ZipFile(tmp_path / "liger_kernel-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("liger_kernel/__init__.py", "")
        wheel.writestr("liger_kernel/transformers/__init__.py", "")
        wheel.writestr("liger_kernel/transformers/functional.py", source)
        wheel.writestr("liger_kernel-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: liger-kernel\nVersion: 0.1.2\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    select = ["--select", "kernels: rms_norm 4096x4096 float16"]
    try:
        _, found = check(tmp_path / "with", "--wheels", str(tmp_path), *select)
    finally:
        for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
            del sys.modules[name]
    liger = next(row for row in found if row.get("provider") == "Liger-Kernel")
    assert liger["status"] == "ok" and liger["verified"] and liger["liger-kernel"] == "0.1.2"


def test_tests_of_generate_run_too_after_the_first_tokens(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_check, "run_tests", lambda run, paths, marker, share: asked.append((paths, marker)))
    run = Run(None, torch.device("cuda"), 0)
    for name in ("tests", "tests of generate", "other tests"):
        for item in gpu_check.SECTIONS[name](run):
            item.run()
    assert all((ROOT / path).exists() for paths, _ in asked for path in paths)
    assert (["tests/kernels"], "gpu") in asked and (["tests/kernels"], "not gpu") in asked
    assert any("tests/fast/test_gpu.py" in paths and "tests/fast/test_graphs.py" in paths for paths, _ in asked)
    order = list(gpu_check.SECTIONS)
    assert order.index("decode") < order.index("tests of generate") < order.index("kernels")


def test_list_is_in_order_of_value():
    names = module("benchmarks.gpu_check", "--list").stdout.splitlines()
    assert names[0].startswith("tests: ") and names[1].startswith("ceilings: ")
    assert len(names) == len(set(names)) > 100
    last_bf16 = max(i for i, name in enumerate(names) if name.startswith("kernels: ") and name.endswith("bfloat16"))
    assert last_bf16 < min(i for i, name in enumerate(names) if name.startswith("float16: "))


def test_rates_are_of_the_ceiling_of_the_same_run(tmp_path, monkeypatch):
    """The rows of a GPU, whose clock is replaced."""
    case = next(case for case in cases(tiny=True) if case.flops)
    table = [case, next(case for case in cases(tiny=True) if case.kernel == "gelu")]
    monkeypatch.setattr(gpu_check, "cases", lambda tiny: table)
    monkeypatch.setattr(gpu_check, "device_time", lambda call, *_: Timing(1.0, 2.0, 3.0, 10, "clock"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    run = Run(Rows(tmp_path, "x", {}), torch.device("cpu"), 100)
    run.dry = False
    run.add("ceiling", unit="GB/s", dtype="any", value=4.0)
    run.add("ceiling", unit="TFLOP/s", dtype="float16", value=0.5)
    for item in table:
        gpu_check.measure(run, item, torch.float16, item.providers)
    attention, memory = (next(row for row in run.rows.rows if row.get("kernel") == item.kernel) for item in table)
    assert attention["unit"] == "TFLOP/s" and attention["rate"] == pytest.approx(case.flops / 2e-6 / 1e12, abs=0.05)
    inputs = table[1].make(torch.device("cpu"), torch.float16)
    assert memory["bytes"] == 2 * inputs[0].nbytes and memory["ceiling"] == 4.0
    assert memory["percent"] == pytest.approx(100 * memory["bytes"] / 2e-6 / 1e9 / 4.0, rel=0.1)


def test_counted_bytes_are_the_declared_ones():
    """Two counts made apart: the table's, and what the operators declare."""
    from llava15_kernels._registry import OPERATORS

    for case in cases(tiny=True):
        checker = Checker(case, torch.device("cpu"), torch.float16)
        inputs = checker.inputs
        if case.kernel == "rms_norm":
            x, weight, *residual = inputs
            op = "add_rms_norm" if residual else "rms_norm"
            assert checker.traffic == OPERATORS[op].cost(x, *residual, weight, 1e-6).bytes
        elif case.kernel == "qk_norm_rope":
            q, k, v, *weights, positions, frequencies, k_cache, v_cache = inputs
            declared = OPERATORS["qk_norm_rope_into_cache"].cost(
                q, k, *weights, 1e-6, positions, frequencies, 1.0, v, k_cache, v_cache, positions
            )
            assert checker.traffic == declared.bytes - positions.nbytes
        elif case.kernel == "vision_rope_2d":
            assert checker.traffic == OPERATORS["vision_rope_2d"].cost(*inputs).bytes


@pytest.mark.parametrize("processes", [[], ["-n", "1"]], ids=["", "xdist"])
def test_outcomes_of_tests_are_read_from_what_pytest_prints(tmp_path, monkeypatch, processes):
    """Of a run that is cut off, too."""
    (tmp_path / "test_x.py").write_text(
        "import pytest, time\n"
        "@pytest.mark.parametrize('x', ['batch 1, 2'])\n"
        "def test_a(x): pass\n"
        "def test_b(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_c(): pass\n"
        "def test_d(): time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "LEAST", 5.0)
    monkeypatch.setattr(gpu_check, "parallel", lambda: processes)
    run = Run(Rows(tmp_path, "x", {}), torch.device("cpu"), 100)
    run.dry = False
    for share, selection, counts in ((0.0, "", (1, 1, 1)), (1.0, "skip", (0, 0, 1))):
        gpu_check.run_tests(run, ["test_x.py"], selection, share)
        row = run.rows.rows[-1]
        assert (row["passed"], row["failed"], row["skipped"]) == counts
        assert row["timed_out"] is (share == 0.0) and list(row["failing"]) == ["test_x.py::test_b"] * counts[1]
    assert run.failures() == [""]


class Device:
    """A device that takes `work` seconds to reach an event, unless it is held for longer."""

    def __init__(self, monkeypatch, needed):
        self.held = []
        monkeypatch.setattr(torch.cuda, "_sleep", self.held.append)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(timing, "_flush_buffer", lambda device: torch.ones(1))
        monkeypatch.setattr(timing, "_cycles_per_second", lambda device: 1e6)
        device = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                pass

            def query(self):
                return device.held[-1] < needed

            def elapsed_time(self, other):
                return 0.5

        monkeypatch.setattr(torch.cuda, "Event", Event)


def test_repetitions_that_the_host_delayed_are_dropped(monkeypatch):
    device = Device(monkeypatch, needed=3000)
    found = timing._event_time(lambda: None, torch.device("cpu"), 10)
    assert found.p50 == 500.0 and found.host_late == 0 and found.repetitions == timing.MOST_REPETITIONS
    assert device.held[0] < 3000 <= device.held[-1], "held for longer, until the host was in time"


def test_a_call_that_waits_for_the_device_is_counted(monkeypatch):
    Device(monkeypatch, needed=1e9)
    found = timing._event_time(lambda: None, torch.device("cpu"), 0)
    assert found.host_late == found.repetitions == timing.FEWEST_REPETITIONS


def test_quantiles():
    found = Timing.of([float(x) for x in range(101)], "clock")
    assert (found.p10, found.p50, found.p90, found.repetitions) == (10.0, 50.0, 90.0, 101)
    assert Timing.of([7.0], "clock").p90 == 7.0


def test_the_commit_without_a_history(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert rows.commit_of(tmp_path) == head
    inner = tmp_path / "inner"
    inner.mkdir()
    assert rows.commit_of(inner) == "unknown", "not the commit of a repository around it"
    (inner / "COMMIT").write_text("abc\n")
    assert rows.commit_of(inner) == "abc"
