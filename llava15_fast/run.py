"""`python -m llava15_fast.run -m MODULE ARGS` or `... SCRIPT ARGS`: another program, with `enable()` before it begins.

    python -m llava15_fast.run -m lmms_eval --model llava_onevision1_5 --model_args pretrained=DIR --tasks mme
    LLAVA15_FAST_BACKEND=torch python -m llava15_fast.run evaluate.py

The program runs as `python -m MODULE` or `python SCRIPT` would run it, in this process. What is patched, and what is not
and why, is written to standard error.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from .enabling import enable

USAGE = "usage: python -m llava15_fast.run (-m MODULE | SCRIPT) [ARGS...]"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    as_module = arguments[:1] == ["-m"]
    rest = arguments[1:] if as_module else arguments
    if not rest or rest[0].startswith("-"):
        raise SystemExit(USAGE)
    try:
        enable(os.environ.get("LLAVA15_FAST_BACKEND", "auto"))
    except ValueError as error:
        raise SystemExit(f"LLAVA15_FAST_BACKEND: {error}") from None
    logger = logging.getLogger("llava15_fast")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    sys.argv = rest  # run_module puts the module's file in the place of its name
    if as_module:
        # `python -m` looks in the working directory first; so it did for this module.
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(rest[0]).resolve().parent)
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main()
