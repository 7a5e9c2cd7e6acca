"""Microbenchmarks by pytest-benchmark; `make test` does not come here.

    PYTHONPATH=kernels python -m pytest benchmarks --benchmark-json=FILE [-k rms_norm]

Without a GPU the kernels run in Triton's interpreter, at tiny sizes: what is timed says nothing, what is wrong is seen.
"""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from benchmarks.gpu_check import Run
from benchmarks.rows import Rows, environment


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(environment())


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The device and its ceilings, each measured when it is first asked for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Run(Rows(tmp_path_factory.mktemp("ceilings"), "ceilings", {}), device, float("inf"))
