"""After a warm-up nothing is left to compile, and nothing is compiled while a graph is captured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import variants

ROOT = Path(__file__).parents[2]
# What is recorded is what Triton would compile; here it would interpret.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
    "PYTHONPATH": "kernels",
    "OMP_NUM_THREADS": "1",
}


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def test_a_warm_up_compiles_all():
    result = python("-m", "benchmarks.variants")
    assert result.returncode == 0 and "missing" not in result.stdout, result.stdout + result.stderr[-2000:]
    assert 10 <= int(result.stdout.split()[3]) <= 40


def test_what_is_missing_is_named():
    code = """
import sys
from benchmarks import variants
from llava15_fast.tools import warmup as warm_up
warm_up.BATCHES = (2,)
sys.exit(variants.main([]))
"""
    result = python("-c", code)
    assert result.returncode == 1 and "_combine_kernel for 16 prompts, padded" in result.stdout, result.stdout + result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests' process compiles there")
def test_an_interpreter_is_refused(capsys):
    assert variants.main([]) == 2 and "TRITON_INTERPRET" in capsys.readouterr().err
