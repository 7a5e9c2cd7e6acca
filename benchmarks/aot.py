"""Every kernel compiled ahead of time, at the shapes of the 4B and the 8B, for architectures that need not be at hand.

    python -m benchmarks.aot [--arch NAME ...] [--json FILE]

The launchers of `llava15_kernels` run on empty CPU tensors while launches are recorded instead of carried out, so what is
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
from llava15_kernels._dispatch import architecture, as_if_on
from llava15_kernels.flash_attn import FlashConfig, flash_config

from .rows import output_file, write_document
from .sizes import TEXT, Text

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

    with mock.patch.object(JITFunction, "run", run):
        yield launches


TOKENS, ROWS, CAPACITY = 1664, 6401, 8192
"""Prompt tokens (a 1120 x 1120 image and 64 of text), vision rows of that image, slots of the cache."""


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name of the configuration, call of the operators) of all hot-path operations."""
    ops = torch.ops.llava15

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of)

    def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
        """As the architecture has it, and by pointers, which serve misaligned tensors everywhere."""
        bounds = torch.tensor([0, len(q)], dtype=torch.int32)
        arguments = (q, k, v, bounds, bounds, len(q), q.shape[-1] ** -0.5, causal)
        ops.flash_attn_varlen(*arguments)
        with flash_config(FlashConfig.choose(q.shape[-1], q.dtype, architecture(q.device), descriptors=False)):
            ops.flash_attn_varlen(*arguments)

    def vision() -> None:
        x, weight = empty(ROWS, 1024), empty(1024)
        q, k, v = empty(ROWS, 3, 16, 64).unbind(1)
        bounds = torch.tensor([0, ROWS], dtype=torch.int32)
        positions = empty(ROWS, 2, of=torch.int32)
        ops.layer_norm(x, weight, weight, 1e-5)
        ops.add_layer_norm(x, x, weight, weight, 1e-5)
        q, k = ops.vision_rope_2d(q, k, positions, empty(16, of=torch.float32), empty(1, 32))
        flash_attn(q, k, v, False)
        ops.gelu(empty(ROWS, 4096), empty(4096))
        ops.gelu(empty(ROWS, 4096), None)
        ops.patch_merge(x, weight, weight, 1e-5, bounds, 2)

    def text(shape: Text) -> None:
        x, weight = empty(TOKENS, shape.hidden_size), empty(shape.hidden_size)
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        packed = empty(1, TOKENS, heads + 2 * kv_heads, shape.head_dim)
        q, k, v = packed.split([heads, kv_heads, kv_heads], dim=2)
        head_weight, inv_freq = empty(shape.head_dim), empty(shape.head_dim // 2, of=torch.float32)
        positions, lengths = empty(1, TOKENS, of=torch.int64), empty(1, of=torch.int32)
        k_cache, v_cache = empty(2, 1, CAPACITY, kv_heads, shape.head_dim)
        ops.rms_norm(x, weight, 1e-6)
        ops.add_rms_norm(x, x, weight, 1e-6)
        ops.silu_and_mul(*(empty(TOKENS, shape.intermediate_size) for _ in "gu"))
        heads_width, kv_width = heads * shape.head_dim, kv_heads * shape.head_dim
        inner, width, none = shape.intermediate_size, shape.hidden_size, [None] * 3
        for rows in (1, 16):
            x, attended, gated = empty(rows, width), empty(rows, heads_width), empty(rows, inner)
            qkv = [empty(n, width) for n in (heads_width, kv_width, kv_width)]
            ops.fused_linear(x, qkv, none, weight if rows == 1 else None, 1e-6, None, False)
            ops.fused_linear(attended, [empty(width, heads_width)], none[:1], None, 0.0, x, False)
            ops.fused_linear(x, [empty(inner, width)] * 2, none[:2], weight if rows == 1 else None, 1e-6, None, True)
            ops.fused_linear(gated, [empty(width, inner)], none[:1], None, 0.0, x, False)
        if shape != TEXT["4b"]:
            return  # heads are the same in both: what follows does not depend on the width
        ops.rms_norm(q, head_weight, 1e-6)
        ops.qk_norm_rope(q, k, head_weight, head_weight, 1e-6, positions, inv_freq, 1.0)
        slots = k_cache.flatten(0, 1), v_cache.flatten(0, 1), positions
        for tokens in (TOKENS, 1):
            some, (keys, values, rows) = [side[:, :tokens] for side in (q, k, v)], slots
            shared = head_weight, head_weight, 1e-6, positions[:, :tokens], inv_freq, 1.0
            ops.qk_norm_rope_into_cache(*some[:2], *shared, some[2], keys, values, rows[:, :tokens])
        flash_attn(q[0], k[0], v[0], True)
        new = (*(side[:, :1] for side in (q, k, v)), head_weight, head_weight, 1e-6, positions[:, :1], inv_freq, 1.0)
        ops.decode_attention(*new, k_cache, v_cache, lengths, lengths, 0.088, 0)
        for queries in (1, 32):  # a token, and what a draft proposes
            ops.flash_decode(q[:, :queries], k_cache, v_cache, lengths, lengths, 0.088, True, 0)

    yield "vision", vision
    yield "4b text", lambda: text(TEXT["4b"])
    yield "8b text", lambda: text(TEXT["8b"])


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
    for arch in archs:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if dtype == torch.float32 and arch not in FLOAT32_ARCHITECTURES:
                continue
            for config, call in cases(dtype):
                with as_if_on(arch), recorded_launches() as launches:
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
