"""What an installation consists of and what would run on it: `llava15-fast env`, for bug reports and for a first look."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from rich.table import Column, Table
from rich.text import Text

import llava15_fast
import llava15_kernels
from llava15_kernels._dispatch import INTERPRETED, default_backend

from ..versions import DECLARED, installed, is_inside

OPTIONAL = ("peft", "torchao", "kernels")
PACKAGES = ("python", "torch", "triton", "transformers", "accelerate", "numpy", "safetensors", "pillow", *OPTIONAL)
"""Packages whose versions matter, the last ones where they are installed."""

RUNS = {
    "cuda": "the Triton kernels, on the GPU",
    "interpreter": "the Triton kernels, in Triton's interpreter (slow: for tests)",
    "cpu": "their eager counterparts in torch, on the CPU",
}


def environment() -> dict[str, Any]:
    """Everything that `llava15-fast env` shows, as JSON can hold it. Touches no GPU's memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **{own.__name__: f"{own.__version__}, {Path(own.__file__).parent}" for own in (llava15_fast, llava15_kernels)},
        "system": platform.platform(),
        "versions": [_version(name) for name in PACKAGES],
        "build": {"cuda": torch.version.cuda, "hip": torch.version.hip, "driver": _driver() if torch.version.cuda else None},
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "backend": default_backend(device),
        "runs": RUNS["cuda" if device.type == "cuda" else "interpreter" if INTERPRETED else "cpu"],
        "interpreter": INTERPRETED,
        "kernel_cache": _cache_folder(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("TRITON_", "LLAVA15_"))},
    }


def table(found: dict[str, Any]) -> Table:
    """`environment()` for people."""
    rows = Table(Column(), Column(overflow="fold"), title="llava15-fast env", show_header=False)

    def row(name: str, *parts: str | tuple[str, str]) -> None:
        rows.add_row(Text(name), Text.assemble(*parts))  # paths may hold what rich takes for markup

    for name in ("llava15_fast", "llava15_kernels", "system"):
        row(name, found[name])
    for package in found["versions"]:
        name, version, declared, inside = package.values()
        if version or name not in OPTIONAL:
            outside = "  OUTSIDE" if inside is False else ""
            row(name, version or ("not installed", "red"), f"   {declared}" if declared else "", (outside, "red"))
    row("torch was built for", ", ".join(f"{name} {value}" for name, value in found["build"].items() if value) or "CPU")
    for device in found["devices"]:
        row(f"GPU {device['index']}", f"{device['name']}, {device['capability']}, {device['memory_gib']} GiB")
    if not found["devices"]:
        row("GPU", "none that torch can use")
    row("backend", f"{found['backend']}: {found['runs']}")
    row("Triton's interpreter", "on" if found["interpreter"] else "off")
    cache = found["kernel_cache"]
    row("kernel cache", cache["folder"], ("" if cache["writable"] else "  NOT WRITABLE", "red"))
    for name, value in found["variables"].items():
        row(name, value)
    return rows


def _version(name: str) -> dict[str, Any]:
    version, declared = installed(name), DECLARED.get(name)
    inside = None if declared is None else version is not None and is_inside(version, declared)
    return {"name": name, "version": version, "declared": declared, "inside": inside}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _device(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    capability = found.gcnArchName if torch.version.hip else f"sm_{found.major}{found.minor}"
    memory = round(found.total_memory / 2**30)
    return {"index": index, "name": found.name, "capability": capability, "memory_gib": memory}


def _cache_folder() -> dict[str, Any]:
    """Where Triton keeps compiled kernels, and whether they will be kept."""
    folder = Path(triton.knobs.cache.dir)
    # Triton makes the folder when it needs it; with TRITON_CACHE_DIR set to nothing it refuses to compile.
    present = next(path for path in (folder, *folder.parents) if path.exists())
    writable = present.is_dir() and os.access(present, os.W_OK | os.X_OK)
    return {"folder": triton.knobs.cache.dir, "writable": bool(triton.knobs.cache.dir) and writable}
