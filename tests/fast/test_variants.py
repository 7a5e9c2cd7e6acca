"""After a warm-up nothing is left to compile, and nothing is compiled while a graph is captured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = "tests/fast/compiled_variants.py"


def python(*arguments):
    """Without the interpreter: what is recorded is what Triton would compile."""
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environ |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True)


@pytest.mark.slow
def test_a_warm_up_compiles_all():
    result = python(PROGRAM)
    assert result.returncode == 0 and "missing" not in result.stdout, result.stdout + result.stderr[-2000:]
    assert 10 <= int(result.stdout.split()[3]) <= 40


@pytest.mark.slow
def test_what_is_missing_is_named():
    code = f"""
import runpy
from llava15_fast.tools import warmup
warmup.BATCHES = (2,)
runpy.run_path({PROGRAM!r}, run_name="__main__")
"""
    result = python("-c", code)
    assert result.returncode == 1 and "_combine_kernel for 16 prompts, padded" in result.stdout, result.stdout + result.stderr
