"""What an installation consists of and what would run on it: `llava15-fast env`, for bug reports and for a first look."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from rich.markup import escape
from rich.table import Table

import llava15_kernels
from llava15_kernels._dispatch import INTERPRETED, default_backend

from ..versions import DECLARED, installed, is_inside

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "safetensors", "pillow", "peft", "torchao", "kernels")
"""Packages whose versions matter, the last three where they are installed."""

OPTIONAL = frozenset({"peft", "torchao", "kernels"})


def environment() -> dict[str, Any]:
    """Everything that `llava15-fast env` shows, as JSON can hold it. Touches no GPU's memory."""
    import llava15_fast

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "llava15_fast": f"{llava15_fast.__version__}, {Path(llava15_fast.__file__).parent}",
        "llava15_kernels": f"{llava15_kernels.__version__}, {Path(llava15_kernels.__file__).parent}",
        "system": platform.platform(),
        "versions": [_version(name, installed(name)) for name in ("python", *PACKAGES)],
        "build": {"cuda": torch.version.cuda, "hip": torch.version.hip, "driver": _driver()},
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "backend": default_backend(device),
        "runs": _what_runs(device),
        "interpreter": INTERPRETED,
        "kernel_cache": _cache_folder(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("TRITON_", "LLAVA15_"))},
    }


def table(found: dict[str, Any]) -> Table:
    """`environment()` for people."""
    rows = Table(title="llava15-fast env", show_header=False)
    rows.add_column()
    rows.add_column(overflow="fold")
    for name in ("llava15_fast", "llava15_kernels", "system"):
        rows.add_row(name, escape(found[name]))
    for version in found["versions"]:
        if version["version"] is None and version["name"] in OPTIONAL:
            continue
        text = version["version"] or "[red]not installed[/red]"
        if version["declared"]:
            text += f"   {version['declared']}" + ("" if version["inside"] else "  [red]OUTSIDE[/red]")
        rows.add_row(version["name"], text)
    build = [f"{name} {value}" for name, value in found["build"].items() if value]
    rows.add_row("torch was built for", ", ".join(build) or "CPU")
    for device in found["devices"]:
        described = f"{device['name']}, {device['capability']}, {device['memory_gib']} GiB"
        rows.add_row(f"GPU {device['index']}", escape(described))
    if not found["devices"]:
        rows.add_row("GPU", "none that torch can use")
    rows.add_row("backend", f"{found['backend']}: {found['runs']}")
    rows.add_row("Triton's interpreter", "on" if found["interpreter"] else "off")
    cache = found["kernel_cache"]
    rows.add_row("kernel cache", escape(cache["folder"]) + ("" if cache["writable"] else "  [red]NOT WRITABLE[/red]"))
    for name, value in found["variables"].items():
        rows.add_row(escape(name), escape(value))
    return rows


def _version(name: str, version: str | None) -> dict[str, Any]:
    declared = DECLARED.get(name)
    inside = None
    if declared is not None:
        # A build of a release that was not made yet, or for some CUDA, is judged by its number.
        inside = version is not None and is_inside(name, version)
    return {"name": name, "version": version, "declared": declared, "inside": inside}


def _driver() -> str | None:
    if not torch.version.cuda:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return {
        "index": index,
        "name": properties.name,
        "capability": capability,
        "memory_gib": round(properties.total_memory / 2**30),
    }


def _what_runs(device: torch.device) -> str:
    if device.type == "cuda":
        return "the Triton kernels, on the GPU"
    if INTERPRETED:
        return "the Triton kernels, in Triton's interpreter (slow: for tests)"
    return "their eager counterparts in torch, on the CPU"


def _cache_folder() -> dict[str, Any]:
    """Where Triton keeps compiled kernels, and whether they will be kept."""
    name = triton.knobs.cache.dir
    if not name:  # TRITON_CACHE_DIR is set to nothing: Triton refuses to compile
        return {"folder": "", "writable": False}
    folder = Path(name)
    # Triton makes the folder when it needs it.
    present = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=present):
            writable = True
    except OSError:
        writable = False
    return {"folder": str(folder), "writable": writable}
