"""A pytest plugin: the outcome of each test, written as it comes, so that a run that is cut off is counted as far as it came.

LLAVA15_OUTCOMES=FILE pytest -p benchmarks.outcomes
"""

import json
import os
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    file = os.environ.get("LLAVA15_OUTCOMES")
    if not file or "PYTEST_XDIST_WORKER" in os.environ:  # the controlling process hears of every test
        return
    if report.when == "call" or report.outcome != "passed":
        message = str(report.longrepr).strip().splitlines()[-1][:300] if report.failed else ""
        with open(file, "a") as stream:
            stream.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "message": message}) + "\n")
