"""Where measurements go: one JSON-lines file and one log, each line on the disk before the next measurement begins.

A run that is cut off leaves every row it finished, and the next one adds to them. Each row stands alone: device, driver,
versions, commit and when its run began are in it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parents[1]


def environment(commit: str | None = None) -> dict[str, Any]:
    """What a number depends on besides the code that was timed."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()})",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": version("transformers"),
        **competitors(),
        "python": platform.python_version(),
        "commit": commit or commit_of(ROOT),
        "sources": sources(),
    }


def competitors() -> dict[str, str]:
    """Versions of those libraries to compare with that are here."""
    found = {}
    for name in ("liger-kernel", "flash-attn"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit_of(root: Path) -> str:
    """The commit of the checkout at `root`; without its history what the file COMMIT says, or "unknown"."""
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if top and Path(top).resolve() == root.resolve():  # and not a repository that the folder happens to lie in
        # A run before this one may have left its results.
        what = ("--", ".", ":!benchmarks/results")
        changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", *what)
        return _output("git", "-C", str(root), "rev-parse", "HEAD") + ("-changed" if changed else "")
    named = root / "COMMIT"
    return named.read_text().strip() if named.is_file() else "unknown"


def sources() -> str:
    """A digest of both packages' files: what was timed, whatever the commit says."""
    digest = hashlib.sha256()
    for file in sorted([*(ROOT / "kernels/llava15_kernels").glob("*.py"), *(ROOT / "llava15_fast").glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = result.stdout.strip().splitlines() if result.returncode == 0 else []
    return lines[0] if lines else ""


def positive(text: str) -> int:
    """A type of arguments."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def positive_seconds(text: str) -> float:
    """A type of arguments."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def output_folder(text: str) -> Path:
    """A type of arguments: a folder that is there or can be made."""
    path = Path(text)
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written to")
    return path


def output_file(text: str) -> Path:
    """A type of arguments: a file whose folder is there or can be made."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    return output_folder(str(Path(text).parent)) / Path(text).name


def write_document(file: Path, document: dict[str, Any]) -> None:
    """One JSON file, in a folder that is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")


class Rows:
    """Appends rows to `folder/<stem>.jsonl` and lines to `folder/<stem>.log`; the lines go to stderr too.

    Attributes:
        rows: of this run; with `resume` all that are in the file, and this run is the one that was begun last.
    """

    def __init__(self, folder: Path, stem: str, common: dict[str, Any], resume: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self._log = folder / f"{stem}.jsonl", folder / f"{stem}.log"
        if self.file.is_file() and self.file.read_text()[-1:] not in ("", "\n"):
            _append(self.file, "")  # ends a line that was cut off
        self.rows = read(self.file) if resume else []
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.common = {"started": self.rows[-1]["started"] if self.rows else now, **common}
        if not self.file.is_file():
            self.file.write_text("")

    def add(self, **row: Any) -> None:
        row = {**row, **self.common}
        self.rows.append(row)
        _append(self.file, json.dumps(row))

    def log(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {text}"
        print(line, file=sys.stderr, flush=True)
        _append(self._log, line)


def read(file: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; a last line that was cut off is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def results(folder: Path) -> list[dict[str, Any]]:
    """The rows of every run under `folder`, oldest file name first."""
    return [row for file in sorted(folder.glob("*/*.jsonl")) for row in read(file)]


def _append(file: Path, line: str) -> None:
    with file.open("a") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())
