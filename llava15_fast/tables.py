"""Tables as `print` shows them."""

from __future__ import annotations

import shutil
import sys
from io import StringIO
from typing import Any

from rich.console import Console

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
