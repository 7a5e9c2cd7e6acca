"""`llava15-fast env`: versions, device, backend and kernel cache, for bug reports."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import triton
from rich.table import Column, Table
from rich.text import Text
from torch.utils import collect_env

import llava15_fast
import llava15_kernels
from llava15_kernels._dispatch import INTERPRETED, default_backend

from ..versions import DECLARED, installed, is_inside

OPTIONAL = ("peft", "torchao", "kernels")
PACKAGES = ("python", "torch", "triton", "transformers", "accelerate", "numpy", "safetensors", "pillow", *OPTIONAL)
"""Packages whose versions are reported, optional ones only if installed."""


def environment() -> dict[str, Any]:
    """Everything that `llava15-fast env` shows, JSON-serializable. Allocates no GPU memory."""
    device, folder = torch.device("cuda" if torch.cuda.is_available() else "cpu"), triton.knobs.cache.dir
    return {
        **{own.__name__: f"{own.__version__}, {Path(own.__file__).parent}" for own in (llava15_fast, llava15_kernels)},
        "system": platform.platform(),
        "versions": [_version(name) for name in PACKAGES],
        "build": {"cuda": torch.version.cuda, "hip": torch.version.hip},
        "driver": collect_env.get_nvidia_driver_version(collect_env.run),
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "backend": default_backend(device),
        "interpreter": INTERPRETED,
        "kernel_cache": {"folder": folder, "writable": bool(folder) and _is_writable(Path(folder))},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("TRITON_", "LLAVA15_"))},
    }


def table(found: dict[str, Any]) -> Table:
    """`environment()` as a table."""
    lines = {name: found[name] for name in ("llava15_fast", "llava15_kernels", "system")}
    for name, version, declared, inside in map(dict.values, found["versions"]):
        if version or name not in OPTIONAL:
            outside = "OUTSIDE" if inside is False else ""
            lines[name] = f"{version or 'not installed'}   {declared or ''}  {outside}".rstrip()
    lines["torch was built for"] = ", ".join(f"{name} {value}" for name, value in found["build"].items() if value) or "CPU"
    lines["driver"] = found["driver"] or "none"
    for device in found["devices"] or [None]:
        described = device and f"{device['name']}, {device['capability']}, {device['memory_gib']} GiB"
        lines["GPU" if device is None else f"GPU {device['index']}"] = described or "none that torch can use"
    lines["backend"] = found["backend"]
    lines["Triton's interpreter"] = "on" if found["interpreter"] else "off"
    lines["kernel cache"] = found["kernel_cache"]["folder"] + ("" if found["kernel_cache"]["writable"] else "  NOT WRITABLE")
    rows = Table(Column(), Column(overflow="fold"), title="llava15-fast env", show_header=False)
    for name, line in {**lines, **found["variables"]}.items():
        rows.add_row(Text(name), Text(line))  # not str: paths may contain rich markup
    return rows


def _version(name: str) -> dict[str, Any]:
    version, declared = installed(name), DECLARED.get(name)
    inside = None if declared is None else version is not None and is_inside(version, declared)
    return {"name": name, "version": version, "declared": declared, "inside": inside}


def _device(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    capability = found.gcnArchName if torch.version.hip else f"sm_{found.major}{found.minor}"
    return {"index": index, "name": found.name, "capability": capability, "memory_gib": round(found.total_memory / 2**30)}


def _is_writable(folder: Path) -> bool:
    """Triton creates its cache folder on demand; with an empty TRITON_CACHE_DIR it refuses to compile."""
    present = next(path for path in (folder, *folder.parents) if path.exists())
    return present.is_dir() and os.access(present, os.W_OK | os.X_OK)
