"""Every kernel compiled ahead of time, at the shapes of the catalogue (`cases.py`), for architectures that need not be at hand.

    python -m benchmarks.aot [--arch NAME ...] [--json FILE]

The functions of `llava15_kernels` run on empty CPU tensors while launches are recorded instead of carried out, so what is
compiled is what would be launched: the same tiles, warps and specialisation (16-byte aligned pointers, arguments divisible
by 16, ones).
The figures come from the compiled code itself: ptxas and SASS for NVIDIA, the amdgcn text for AMD. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

import llava15_kernels
from llava15_kernels import _dispatch, flash_attn_varlen_func, flash_attn_with_kvcache, qk_norm_rope, rms_norm
from llava15_kernels._dispatch import architecture, as_if_on
from llava15_kernels.flash_attn import FlashConfig, flash_config

from .cases import cases
from .rows import output_file, write_document

RESULT = Path(__file__).parent / "results/aot.json"

# Shared memory that one program may have, in bytes.
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}
FLOAT32_ARCHITECTURES = ("sm_80", "sm_90")
FLASH_KERNELS = ("_flash_attn_kernel", "_flash_attn_tiles_kernel")
MATRIX_INSTRUCTION = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "v_mfma", "gfx950": "v_mfma"}  # else mma.sync
REGISTERS_PER_PROCESSOR = 65536
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


def target_of(arch: str) -> GPUTarget:
    """Triton's name of an architecture: "sm_90" or "gfx942"."""
    if arch not in SHARED_LIMIT:
        raise ValueError(f"unknown architecture {arch!r}, expected one of {', '.join(SHARED_LIMIT)}")
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collects launches in the place of carrying them out."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, grid, args, kwargs))

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(_dispatch, "default_backend", lambda device: "triton"):
        yield launches


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of every case of the catalogue, and of what it does not time."""
    with mock.patch.object(torch, "randn", partial(torch.empty, dtype=dtype)):  # nothing is computed or converted
        for case in cases():
            if "batch 16" not in case.name:  # the same kernels on gigabytes
                yield case.id, partial(case.ours, *case.make(torch.device("cpu"), dtype))
        q, k, v = torch.empty(1, 64, 48, 128, dtype=dtype).split([32, 8, 8], dim=2)
        weight, positions = torch.empty(128, dtype=dtype), torch.zeros(1, 64, dtype=torch.long)
        yield "rms_norm of heads", partial(rms_norm, q, weight, 1e-6)
        yield "qk_norm_rope without a cache", partial(qk_norm_rope, q, k, weight, weight, 1e-6, positions, torch.empty(64))
        cache = torch.empty(2, 1, 8192, 8, 128, dtype=dtype)
        yield "flash_attn_with_kvcache, 32 queries", partial(flash_attn_with_kvcache, q[:, :32], *cache, causal=True)
        bounds = torch.tensor([0, 64], dtype=torch.int32)
        for name, heads in (("causal", (q[0], k[0], v[0])), ("vision", torch.empty(3, 64, 16, 64, dtype=dtype))):
            call = partial(flash_attn_varlen_func, *heads, bounds, bounds, 64, 64, causal=name == "causal")
            yield f"flash_attn_varlen_func {name}, by pointers", partial(by_pointers, call, heads[0])


def by_pointers(call: Callable[[], Any], q: torch.Tensor) -> None:
    """As for misaligned tensors, everywhere."""
    with flash_config(FlashConfig.choose(q.shape[-1], q.dtype, architecture(q.device), descriptors=False)):
        call()


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], dict[str, int]]:
    """signature, constants, attributes and options, as Triton's own launch would derive them."""
    kernel = launch.kernel
    options = {key: value for key, value in launch.kwargs.items() if key not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | {
        key: value for key, value in launch.kwargs.items() if key in kernel.arg_names
    }
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = mangle_type(value)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif parameter.do_not_specialize:
            signature[name] = "i32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def compile_launch(launch: Launch, arch: str) -> dict[str, Any]:
    """The row's figures of one launch on one architecture."""
    signature, constants, attributes, options = specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = target_of(arch)
    compiled = triton.compile(source, target=target, options=options)
    figures = nvidia_figures(compiled, arch) if target.backend == "cuda" else amd_figures(compiled)
    warps = options.get("num_warps", 4)
    row = {
        **figures,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[arch],
        "num_warps": warps,
        "num_stages": options.get("num_stages", compiled.metadata.num_stages),
        "programs": int(torch.tensor(launch.grid).prod()),
    }
    if target.backend == "cuda":
        by_registers = REGISTERS_PER_PROCESSOR // (-(-figures["registers"] // 8) * 8 * 32 * warps)
        by_shared = SHARED_LIMIT[arch] // (compiled.metadata.shared + 1024)
        row["programs_per_processor"] = min(by_registers, by_shared, 48 // warps, 32)
    return row


_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def nvidia_figures(compiled: Any, arch: str) -> dict[str, Any]:
    """Registers, stack, spills from ptxas; instructions from PTX and SASS."""
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        ptx_file, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx_file.write_text(ptx)
        cubin.write_bytes(compiled.asm["cubin"])
        name = re.search(r"^\.target (\w+)", ptx, re.M)[1]
        ptxas = get_ptxas(int(arch[3:])).path
        log = subprocess.run(
            [ptxas, "-v", f"--gpu-name={name}", ptx_file, "-o", Path(folder) / "again.cubin"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
        sass = subprocess.run([_TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [_TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spills = [int(value) for value in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    matrix = [name for name in ("wgmma", "tcgen05", "mma.sync") if f"{name}." in ptx or f"{name}.mma" in ptx]
    loops = loop_instructions(sass)
    return {
        "registers": numbers["REG"],
        "stack_bytes": numbers["STACK"],
        "local_bytes": numbers["LOCAL"],
        "spill_bytes": sum(spills),
        "mma": matrix[0] if matrix else "none",
        "mma_serialized": "instructions are serialized" in log,
        "load_bytes": widest(ptx, r"ld\.global"),
        "store_bytes": widest(ptx, r"st\.global"),
        "loop_local": sum(loops.get(name, 0) for name in ("LDL", "STL")),
        "loop_mix": dict(sorted(loops.items(), key=lambda item: -item[1])[:8]),
    }


def widest(ptx: str, kind: str) -> int:
    """Bytes of the widest global access of a kind; asynchronous copies to shared memory are loads."""
    found = [0]
    for vector, bits in re.findall(rf"{kind}[\w.]*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx):
        found.append(int(vector or 1) * int(bits) // 8)
    if kind.startswith("ld"):
        found += [
            int(size, 0)
            for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x\d+|\d+)", ptx)
            if int(size, 0) <= 16
        ]
        found += [16] * ("cp.async.bulk" in ptx)
    return max(found)


def loop_instructions(sass: str) -> dict[str, int]:
    """Instructions of the innermost loop with the most matrix instructions, of several the shortest, which masks nothing;
    without matrix instructions the longest loop; {} without a loop.
    """
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", line):
            code.append((instruction[1], instruction[2]))
    loops = []
    for index, (name, operands) in enumerate(code):
        if name == "BRA" and (label := re.search(r"\.L_x_\d+", operands)) and labels.get(label[0], index + 1) <= index:
            loops.append((labels[label[0]], index + 1))
    # A branch to itself closes every kernel; it is no loop.
    loops = [(start, end) for start, end in loops if end - start > 1]
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not innermost:
        return {}

    def weight(loop: tuple[int, int]) -> tuple[int, int]:
        names = [name for name, _ in code[loop[0] : loop[1]]]
        products = sum("MMA" in name for name in names)
        return products, -len(names) if products else len(names)

    start, end = max(innermost, key=weight)
    mix: dict[str, int] = {}
    for name, _ in code[start:end]:
        mix[name] = mix.get(name, 0) + 1
    return mix


def amd_figures(compiled: Any) -> dict[str, Any]:
    """The same from the amdgcn text. Scratch counts as stack; instructions are counted over the whole kernel."""
    text = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    def access(kind: str) -> int:
        sizes = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
        found = re.findall(rf"(?:global|buffer)_{kind}_(\w+?)(?:_d16\w*)?\s", text)
        return max([sizes.get(name.replace("lds_", ""), 0) for name in found] or [0])

    return {
        "registers": metadata("vgpr_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "local_bytes": len(re.findall(r"\bscratch_(?:load|store)", text)),
        "spill_bytes": 4 * (metadata("vgpr_spill_count")),
        "mma": "v_mfma" if "v_mfma" in text else "none",
        "load_bytes": access("load"),
        "store_bytes": access("store"),
        "loop_local": len(re.findall(r"\bscratch_(?:load|store)", text)),
        "loop_mix": {},
    }


@dataclass(frozen=True)
class Work:
    """One kernel to compile for one architecture."""

    arch: str
    config: str
    dtype: str
    launch: Launch


def collect(archs: list[str]) -> list[Work]:
    """One entry per distinct compiled kernel, configuration, dtype and architecture."""
    work: list[Work] = []
    seen = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for config, call in calls(dtype):
            for arch in archs:
                if dtype == torch.float32 and arch not in FLOAT32_ARCHITECTURES:
                    continue
                with as_if_on(arch), recorded_launches() as launches, torch.no_grad():
                    call()
                for launch in launches:
                    key = (arch, dtype, launch.kernel.__name__, repr(specialise(launch)))
                    if key not in seen:
                        seen.add(key)
                        work.append(Work(arch, config, str(dtype).removeprefix("torch."), launch))
    return work


def digest(work: list[Work]) -> str:
    """Changes when a kernel's code or a launch's specialisation does, and not otherwise."""
    parts = sorted(
        repr((item.arch, item.dtype, item.launch.kernel.__name__, jit_source(item.launch.kernel), specialise(item.launch)))
        for item in work
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def jit_source(kernel: JITFunction) -> str:
    """The text of every jitted function that the kernel's module holds or imports."""
    functions = [value for value in vars(sys.modules[kernel.fn.__module__]).values() if isinstance(value, JITFunction)]
    return "\n".join(sorted(function.src for function in functions))


def compile_all(work: list[Work]) -> list[dict[str, Any]]:
    """The rows of the table, in the order of `work`; when stopped by hand, those of its beginning."""

    def row(item: Work) -> dict[str, Any]:
        return {
            "kernel": item.launch.kernel.__name__,
            "config": item.config,
            "dtype": item.dtype,
            "arch": item.arch,
            **compile_launch(item.launch, item.arch),
            "constants": {key: value for key, value in item.launch.kwargs.items() if key.isupper()},
        }

    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(row, work)
        try:
            rows.extend(track(found, "compiling", len(work), console=Console(stderr=True), transient=True))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
    return rows


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """What breaks a requirement, in words."""
    found = []
    for row in rows:
        where = f"{row['kernel']} ({row['config']}, {row['dtype']}, {row['arch']})"
        attention = row["kernel"] in (*FLASH_KERNELS, "_split_kernel", "_decode_kernel")
        if row["shared_bytes"] > row["shared_limit"]:
            found.append(f"{where}: {row['shared_bytes']} bytes of shared memory, at most {row['shared_limit']}")
        # These write a value or two per thread, from many more that they read.
        reduces = row["kernel"] in ("_combine_kernel", "_one_row_kernel", "_few_rows_kernel")
        if row["load_bytes"] < 16 or row["store_bytes"] < (2 if reduces else 8):
            found.append(f"{where}: widest load {row['load_bytes']}, widest store {row['store_bytes']} bytes")
        if attention and row["dtype"] == "float32":
            continue  # exact float32 attention is judged on correctness alone
        if row["spill_bytes"] or row["loop_local"]:
            found.append(f"{where}: {row['spill_bytes']} bytes spilled, {row['loop_local']} local accesses in the hottest loop")
        if row["stack_bytes"] > 64:
            found.append(f"{where}: {row['stack_bytes']} bytes of stack, at most 64")
        expected = MATRIX_INSTRUCTION.get(row["arch"], "mma.sync")
        if row["kernel"] in FLASH_KERNELS and row["mma"] != expected:
            found.append(f"{where}: uses {row['mma']}, expected {expected}")
        if row.get("mma_serialized"):
            found.append(f"{where}: matrix instructions are serialized")
    return found


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints a table, writes the JSON. Status 1: a requirement is broken or the checked table stale; 130: stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot",
        description="Compiles every kernel ahead of time and reports the registers, memory and instructions that it needs.",
    )
    parser.add_argument(
        "--arch", nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT), metavar="NAME",
        help=f"Only these of {', '.join(SHARED_LIMIT)}.",
    )  # fmt: skip
    parser.add_argument("--json", type=output_file, metavar="FILE", help="Writes the rows to this file.")
    parser.add_argument("--check", type=Path, metavar="FILE", help="Compiles nothing and says whether this file is up to date.")
    arguments = parser.parse_args(argv)
    if llava15_kernels.INTERPRETED:
        print("TRITON_INTERPRET is set: nothing can be compiled", file=sys.stderr)
        return 2
    if arguments.check and not arguments.check.is_file():
        parser.error(f"--check {arguments.check}: there is no such file")
    work = collect(arguments.arch)
    if arguments.check:
        current = json.loads(arguments.check.read_text())["kernels"] == digest(work)
        print("up to date" if current else f"{arguments.check} is stale: python -m benchmarks.aot --json {arguments.check}")
        return 0 if current else 1
    rows = compile_all(work)
    for row in rows:
        print(
            f"{row['arch']:7} {row['dtype']:9} {row['config']:8} {row['kernel']:22} {row['registers']:4} registers, stack "
            f"{row['stack_bytes']}, spills {row['spill_bytes']}, shared {row['shared_bytes']}, {row['mma']}, "
            f"loads {row['load_bytes']}, stores {row['store_bytes']}"
        )
    if arguments.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        document = {**versions, "kernels": digest(work[: len(rows)]), "rows": rows}
        write_document(arguments.json, document)
    for problem in (broken := problems(rows)):
        print(f"NOT AS REQUIRED  {problem}", file=sys.stderr)
    if len(rows) < len(work):
        print(f"stopped by hand after {len(rows)} of {len(work)} kernels", file=sys.stderr)
        return 130
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
