"""What `patch` returns, and the report of what ran."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from ..fast.runtime import runtime_of
from .targets import HEAD, TARGETS, find_model, inner_of

NARROWEST = 100
"""Columns. A narrower terminal breaks lines itself; numbers that a table has cut are lost."""


class _Output(StringIO):
    """In the characters that standard output can show."""

    @property
    def encoding(self) -> str:
        return getattr(sys.stdout, "encoding", None) or "utf-8"


def as_text(renderable: Any) -> str:
    """As wide as the terminal."""
    output = _Output()
    width = max(shutil.get_terminal_size((140, 24)).columns, NARROWEST)
    Console(file=output, width=width, highlight=False).print(renderable)
    return output.getvalue().rstrip()


@dataclass(frozen=True)
class ReportRow:
    """One target: its calls per backend, and its calls of the original per reason."""

    path: str
    kernels: tuple[str, ...]
    backend: str
    ran: dict[str, int]
    fallbacks: dict[str, int]


@dataclass(frozen=True, repr=False)
class Report:
    """Which kernel ran for which module, and why the original ran instead. `print` shows it as a table."""

    rows: tuple[ReportRow, ...]

    def __rich__(self) -> Table:
        table = Table(title="llava15_fast")
        for heading in ("module", "kernel", "ran (calls)", "original ran instead (calls)"):
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            ran = [f"{backend} ({calls})" for backend, calls in row.ran.items()]
            fallbacks = [f"{reason} ({calls})" for reason, calls in row.fallbacks.items()]
            nothing = f"not called yet ({row.backend})" if not row.ran and not row.fallbacks else "-"
            table.add_row(row.path, "\n".join(row.kernels), "\n".join(ran) or nothing, "\n".join(fallbacks) or "-")
        return table

    def __repr__(self) -> str:
        return as_text(self)


class PatchHandle:
    """What `patch` returns: the patched model's report."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def report(self) -> Report:
        """Calls since the model was patched; empty after `unpatch`."""
        root = find_model(self.model)
        # PEFT trains a copy of a module beside it, which has a runtime of its own.
        runtimes = dict.fromkeys(runtime for module in root.modules() if (runtime := runtime_of(module)) is not None)
        rows = []
        for target in TARGETS if runtimes else ():
            if target.kernels and (target.path != HEAD or root is not inner_of(root)):
                records = [runtime.record for runtime in runtimes]
                ran = sum((record.ran[target.name] for record in records), Counter())
                fallbacks = sum((record.fallbacks[target.name] for record in records), Counter())
                rows.append(ReportRow(target.name, target.kernels, next(iter(runtimes)).backend, dict(ran), dict(fallbacks)))
        return Report(tuple(rows))

    def __repr__(self) -> str:
        state = "patched" if self.report().rows else "not patched"
        return f"<PatchHandle of a {type(self.model).__name__}, {state}>"
