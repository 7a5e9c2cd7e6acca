"""What `patch` returns, and the report of what ran."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from torch import nn

from ..fast.runtime import runtime_of
from .targets import HEAD, TARGETS, find_model, inner_of


def as_text(renderable: Any) -> str:
    """Rendered at the terminal's width, without colours."""
    # A narrower terminal wraps lines, but numbers cut off by a table would be lost.
    width = max(shutil.get_terminal_size((140, 24)).columns, 100)
    console = Console(width=width, force_terminal=False, force_jupyter=False, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip()


@dataclass(frozen=True)
class ReportRow:
    """One target: calls per backend, and fallbacks per reason."""

    path: str
    kernels: tuple[str, ...]
    backend: str
    ran: dict[str, int]
    fallbacks: dict[str, int]


@dataclass(frozen=True, repr=False)
class Report:
    """Which kernels ran for which module, and the reasons for fallbacks. `print` shows a table."""

    rows: tuple[ReportRow, ...]

    def __rich__(self) -> Table:
        headings = ("module", "kernel", "ran (calls)", "fallbacks (calls)")
        table = Table(*(Column(heading, overflow="fold") for heading in headings), title="llava15_fast")
        for row in self.rows:
            ran, fallbacks = ("\n".join(f"{what} ({n})" for what, n in calls.items()) for calls in (row.ran, row.fallbacks))
            nothing = "-" if fallbacks else f"not called yet ({row.backend})"
            table.add_row(row.path, "\n".join(row.kernels), ran or nothing, fallbacks or "-")
        return table

    __repr__ = as_text


class PatchHandle:
    """What `patch` returns: the patched model's report."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def report(self) -> Report:
        """Calls since `patch`; empty after `unpatch`."""
        root, rows = find_model(self.model), []
        # PEFT's trainable copy of a module has its own runtime.
        runtimes = list(dict.fromkeys(runtime for module in root.modules() if (runtime := runtime_of(module)) is not None))
        for target in TARGETS if runtimes else ():
            if target.kernels and (target.path != HEAD or root is not inner_of(root)):
                ran = sum((runtime.record.ran[target.name] for runtime in runtimes), Counter())
                fallbacks = sum((runtime.record.fallbacks[target.name] for runtime in runtimes), Counter())
                rows.append(ReportRow(target.name, target.kernels, runtimes[0].backend, dict(ran), dict(fallbacks)))
        return Report(tuple(rows))

    def __repr__(self) -> str:
        state = "patched" if self.report().rows else "not patched"
        return f"<PatchHandle of a {type(self.model).__name__}, {state}>"
