"""Launch configurations that were measured on a device; opt-in.

    LLAVA15_TUNED=FILE python ...        or        use_table(FILE)

By default a rule of head_dim, dtype and architecture decides (`FlashConfig.choose`, `Plan.choose`): the same everywhere, and
nothing is measured at run time. A table replaces the rule for the keys that it holds and no others. Its keys have no lengths in
them either, so that a segment gives the same bits alone and in any pack. `python -m benchmarks.tune` writes such tables:

    {"format": 1,
     "measured": {"device": "...", "torch": "...", "triton": "...", "commit": "..."},
     "configurations": [{"op": "flash_decode", "head_dim": 128, "dtype": "bfloat16", "architecture": "sm_90",
                         "config": {"block_n": 64, "num_warps": 4, "num_stages": 3, "waves": 2}}]}
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("llava15_kernels")

Key = tuple[int, torch.dtype, str]
"""(head_dim, dtype, architecture)"""
Table = Mapping[tuple[str, Key], dict[str, int]]

FIELDS = {
    "flash_attn_varlen": ("block_m", "block_n", "num_warps", "num_stages", "descriptors"),
    "flash_decode": ("block_n", "num_warps", "num_stages", "waves"),
}
"""What a configuration of each operator says, all of it. waves: programs per multiprocessor that the cache is split for;
descriptors: 1 where tiles are read through tensor descriptors."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
_ALLOWED = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": tuple(range(1, 9)),
    "waves": tuple(range(1, 17)),
    "descriptors": (0, 1),
}

_table: Table | None = None
"""None until the first question."""


def tuned(op: str, key: Key) -> dict[str, int] | None:
    """The configuration that the table in use has for this key, with all of `FIELDS[op]`; None: the rule decides."""
    table = _from_environment() if _table is None else _table
    return table.get((op, key)) if table else None


def use_table(file: str | os.PathLike[str] | None) -> None:
    """Takes configurations from this file from now on; None: from none.

    Raises:
        ValueError: the file is no table, or says something that cannot be launched.
        OSError: it cannot be read.
    """
    global _table
    _table = {} if file is None else load(file)


@contextlib.contextmanager
def overridden(table: Table) -> Iterator[None]:
    """Configurations for the time being, as a tuner tries them out."""
    global _table
    before, _table = _table, table
    try:
        yield
    finally:
        _table = before


def load(file: str | os.PathLike[str]) -> Table:
    """The configurations of a file, checked. Raises as `use_table`."""
    path = Path(file)

    def refuse(what: str) -> ValueError:
        return ValueError(f"{path}: {what}")

    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise refuse(f"is no JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != 1:
        raise refuse("is no table of launch configurations of format 1")
    measured = document.get("measured") or {}
    if missing := [name for name in ("device", "torch", "triton", "commit") if not measured.get(name)]:
        raise refuse(f"does not say what it was measured with: {', '.join(missing)}")
    if measured.get("dry_run"):
        raise refuse("is of a dry run: nothing was measured")
    table: dict[tuple[str, Key], dict[str, int]] = {}
    for entry in document.get("configurations") or []:
        place = _key_of(entry, refuse)
        if place in table:
            raise refuse(f"has two configurations for {place}")
        table[place] = _config_of(entry, refuse)
    logger.info("%d launch configurations from %s, measured on %s", len(table), path, measured["device"])
    return table


def _key_of(entry: dict[str, Any], refuse: Any) -> tuple[str, Key]:
    op, dtype = entry.get("op"), entry.get("dtype")
    if op not in FIELDS:
        raise refuse(f"op is {op!r}, expected one of {', '.join(FIELDS)}")
    if dtype not in _DTYPES:
        raise refuse(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    head_dim, architecture = entry.get("head_dim"), entry.get("architecture")
    if type(head_dim) is not int or head_dim < 1 or not isinstance(architecture, str):
        raise refuse(f"head_dim is {head_dim!r} and architecture {architecture!r}, expected a number and a name")
    return op, (head_dim, _DTYPES[dtype], architecture)


def _config_of(entry: dict[str, Any], refuse: Any) -> dict[str, int]:
    op, config = entry["op"], entry.get("config") or {}
    if sorted(config) != sorted(FIELDS[op]):
        raise refuse(f"{op} has a configuration of {', '.join(sorted(config))}, expected {', '.join(FIELDS[op])}")
    for name, value in config.items():
        if type(value) is not int or value not in _ALLOWED[name]:
            raise refuse(f"{op}: {name} is {value!r}, expected one of {', '.join(map(str, _ALLOWED[name]))}")
    return dict(config)


def _from_environment() -> Table:
    use_table(os.environ.get("LLAVA15_TUNED") or None)
    return _table or {}
