"""`python -m llava15_fast.run -m MODULE ARGS` or `... SCRIPT ARGS`: runs a program after `enable()`.

    python -m llava15_fast.run -m lmms_eval --model llava_onevision1_5 --model_args pretrained=DIR --tasks mme
    LLAVA15_FAST_BACKEND=torch python -m llava15_fast.run evaluate.py

The program runs in this process as `python -m MODULE` or `python SCRIPT` would run it. Patched models, and reasons why others
are not patched, are logged to standard error.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .patching.auto import enable

USAGE = "usage: python -m llava15_fast.run (-m MODULE | SCRIPT) [ARGS...]"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    as_module = arguments[:1] == ["-m"]
    program = arguments[1:] if as_module else arguments
    if not program or program[0].startswith("-"):
        raise SystemExit(USAGE)
    backend: Any = os.environ.get("LLAVA15_FAST_BACKEND", "auto")
    try:
        enable(backend)
    except ValueError as error:
        raise SystemExit(f"LLAVA15_FAST_BACKEND: {error}") from None
    if not (importlib.util.find_spec(program[0].partition(".")[0]) if as_module else Path(program[0]).exists()):
        raise SystemExit(f"no {'module named' if as_module else 'program'} {program[0]!r}\n{USAGE}")
    handler, logger = logging.StreamHandler(), logging.getLogger("llava15_fast")
    # Silent once the program has configured logging itself, which then shows the same messages.
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    sys.argv = program  # run_module puts the module's file in the place of its name
    if as_module:
        # As with `python -m`, sys.path starts with the working directory.
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program[0]).resolve().parent)
        # An absolute `__file__`, as python sets it: the script may change the working directory.
        runpy.run_path(os.path.abspath(program[0]), run_name="__main__")


if __name__ == "__main__":
    main()
