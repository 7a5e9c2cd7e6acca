"""The microbenchmarks verify before they time; pytest-benchmark's timer on a GPU, with stand-ins for events."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import EventTimer

ROOT = Path(__file__).parents[2]

BROKEN = """
import llava15_kernels.norms as norms

right = norms._launch

def wrong(*args):
    y, total = right(*args)
    y[..., -1] *= 1.05
    return y, total

norms._launch = wrong
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="breaks a kernel in the interpreter")
def test_a_broken_kernel_fails_and_is_not_reported_while_the_others_are(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "broken", "-p", "no:cacheprovider"]
    command += ["-k", "(rms_norm and 1x2560 and not residual) or (silu_and_mul and 1x9728)", f"--benchmark-json={file}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.count("FAILED benchmarks/test_kernels.py") == 1 and "rms_norm 1x2560 - ours" in result.stdout
    document = json.loads(file.read_text())
    found = {(info["kernel"], info["provider"]): info for info in (row["extra_info"] for row in document["benchmarks"])}
    assert ("rms_norm", "ours") not in found
    assert {("rms_norm", "eager"), ("rms_norm", "copy"), ("silu_and_mul", "ours"), ("silu_and_mul", "eager")} <= found.keys()
    for info in found.values():
        assert info["verified"] and info["p10_us"] <= info["p50_us"] <= info["p90_us"] and info["host_us"] > 0
        assert info["bytes"] > 0 and "rate" not in info, "a CPU's time is not a rate of a GPU"
    assert document["machine_info"].keys() >= {"device", "driver", "torch", "triton", "commit"}


def test_they_are_not_among_the_tests():
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in settings and (ROOT / "benchmarks/test_kernels.py").is_file()


class Events:
    """A device that has to be held for `needed` milliseconds for the host to be in time with everything."""

    def __init__(self, monkeypatch, needed):
        self.held, self.needed, self.flushed = [], needed, 0
        monkeypatch.setattr(torch.cuda, "_sleep", self.held.append)
        monkeypatch.setattr(timing, "_cycles_per_second", lambda device: 1000.0)
        monkeypatch.setattr(timing, "_flush_buffer", lambda device: self)
        events = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                pass

            def query(self):
                return events.held[-1] < events.needed

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 0.25  # milliseconds

        monkeypatch.setattr(torch.cuda, "Event", Event)

    def zero_(self):
        self.flushed += 1


def test_the_event_timer_gives_seconds_and_holds_the_device_back(monkeypatch):
    events = Events(monkeypatch, needed=3)
    timer = EventTimer(torch.device("cpu"))
    taken = []
    for _ in range(6):
        timer.prepare()
        start = timer()
        taken.append(timer() - start)
    assert taken == [2.5e-4] * 6 and events.flushed == 6
    assert timer.late == 3 and timer.hold == pytest.approx(4e-3), "held for longer until the host was in time"
