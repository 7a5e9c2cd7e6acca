"""What a call costs the host is measured without a GPU, and nothing is launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import llava15_kernels
from benchmarks import host_time
from llava15_kernels import _dispatch

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks/results/cpu/host_time.json"
# As flash-attn has them.
ALL = {
    *llava15_kernels.__all__,
    "flash_attn_varlen_func_ref",
    "flash_attn_with_kvcache_func_ref",
    "flash_attn_with_kvcache_ref",
}


def test_command(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": "kernels", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.host_time", "--rounds", "3", "--json", str(tmp_path / "rows.json")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    document = json.loads((tmp_path / "rows.json").read_text())
    assert {"torch", "triton", "python", "commit", "rows"} <= document.keys()
    assert all(row["public_in_adds"] > 1 for row in document["rows"])
    assert document["token"]["layers"] == 36 and document["token"]["token_in_adds"] > 1
    if not torch.cuda.is_available():
        assert document["launches"] == "stubbed" and not any("_us" in key for key in document["rows"][0])
        committed = json.loads(COMMITTED.read_text())
        assert [row["kernel"] for row in committed["rows"]] == [row["kernel"] for row in document["rows"]]
        assert committed["token"].keys() == document["token"].keys() == {"layers", "token_in_adds"}


def test_the_operator_is_the_one_behind_the_function(device):
    """Each pair gives the same numbers, and every public function has one."""
    found = host_time.functions(device, torch.float16)
    public = {name for name in llava15_kernels.__all__ if not name.endswith("_ref")} - {"INTERPRETED", "default_backend"}
    assert {name.partition(",")[0] for name in found} == public
    for name, calls in found.items():
        ours, theirs = (output[0] if isinstance(output, tuple) else output for output in (call() for call in calls))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


def test_stubs_are_taken_back():
    before = _dispatch.default_backend, _dispatch.is_fake
    with host_time.as_if_on_a_gpu(torch.device("cpu")):
        assert _dispatch.default_backend(torch.device("cpu")) == "triton"
    assert (_dispatch.default_backend, _dispatch.is_fake) == before
