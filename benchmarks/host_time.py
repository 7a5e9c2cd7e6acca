"""What a call of each public function costs the host, and how much of it checks the arguments.

    python -m benchmarks.host_time [--json FILE]

On small tensors, each measured in turns with the others:

    public      the function as users call it
    operator    the operator behind it, called with what the function would pass: dispatcher, allocation, configuration, launch
    validation  public - operator: the checks, the choice of the backend, defaults
    boundary    an operator that only allocates, less the allocation: what being an operator costs

And what a token costs it that a CUDA graph replays: everything between two launches of the graph, in `generate` on a patched
model of 36 narrow layers, as many as the 4B and the 8B have. The graph itself is a stand-in that launches nothing.

Without a GPU the launches do nothing, so that the operator's part lacks Triton's launch and the share of validation is an upper
bound; and the times are a CPU's, good for ratios only: to each other, and to `torch.add` in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from triton.runtime.jit import JITFunction

import llava15_kernels
from llava15_kernels import (
    _dispatch,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    gelu,
    layer_norm,
    patch_merge,
    qk_norm_rope,
    rms_norm,
    silu_and_mul,
    vision_rope_2d,
)

from .rows import environment, output_file, positive, write_document
from .timing import Call, host_times

torch.library.define("llava15_benchmarks::allocate", "(Tensor x) -> Tensor")
torch.library.impl("llava15_benchmarks::allocate", ("cpu", "cuda"), torch.empty_like)


@dataclass(frozen=True)
class Function:
    """A public function, and the operator call that it comes down to."""

    name: str
    public: Call
    operator: Call


def functions(device: torch.device, dtype: torch.dtype) -> list[Function]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    ops: Any = torch.ops.llava15
    x, weight = randn(4, 128), randn(128)
    packed = randn(1, 1, 6, 64)
    q, k, v = packed.split([4, 1, 1], dim=2)
    caches, head_weight, lengths, pads = randn(2, 1, 16, 1, 64), randn(64), int32(3), int32(0)
    positions, inv_freq = torch.zeros(1, 1, dtype=torch.long, device=device), torch.rand(32, device=device)
    vision_q, vision_k, vision_v = randn(5, 3, 2, 64).unbind(1)
    places, angles = torch.zeros(5, 2, dtype=torch.int32, device=device), randn(1, 32)
    bounds, frequencies = int32(0, 5), torch.rand(16, device=device)
    rows = {"k_cache": caches[0, 0], "v_cache": caches[1, 0]}
    cached = {"v": v, **rows, "slot_mapping": positions}

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        return lambda: function(*args, **kwargs)

    return [
        Function("rms_norm", call(rms_norm, x, weight, 1e-6), call(ops.rms_norm, x, weight, 1e-6)),
        Function("rms_norm, residual", call(rms_norm, x, weight, 1e-6, x), call(ops.add_rms_norm, x, x, weight, 1e-6)),
        Function("layer_norm", call(layer_norm, x, weight, weight, 1e-6), call(ops.layer_norm, x, weight, weight, 1e-6)),
        Function(
            "layer_norm, residual",
            call(layer_norm, x, weight, weight, 1e-6, x),
            call(ops.add_layer_norm, x, x, weight, weight, 1e-6),
        ),
        Function("silu_and_mul", call(silu_and_mul, x), call(ops.silu_and_mul, *x.chunk(2, -1))),
        Function("gelu", call(gelu, x), call(ops.gelu, x, None)),
        Function(
            "patch_merge",
            call(patch_merge, randn(5, 128), weight, weight, 1e-6, bounds),
            call(ops.patch_merge, randn(5, 128), weight, weight, 1e-6, bounds, 2),
        ),
        Function(
            "vision_rope_2d",
            call(vision_rope_2d, vision_q, vision_k, places, frequencies, angles),
            call(ops.vision_rope_2d, vision_q, vision_k, places, frequencies, angles),
        ),
        Function(
            "qk_norm_rope",
            call(qk_norm_rope, q, k, head_weight, head_weight, 1e-6, positions, inv_freq),
            call(ops.qk_norm_rope, q, k, head_weight, head_weight, 1e-6, positions, inv_freq, 1.0),
        ),
        Function(
            "qk_norm_rope, into the cache",
            call(qk_norm_rope, q, k, head_weight, head_weight, 1e-6, positions, inv_freq, **cached),
            call(
                ops.qk_norm_rope_into_cache,
                q, k, head_weight, head_weight, 1e-6, positions, inv_freq, 1.0, *cached.values(),
            ),
        ),
        Function(
            "flash_attn_varlen_func",
            call(flash_attn_varlen_func, vision_q, vision_k, vision_v, bounds, bounds, 5, 5),
            call(ops.flash_attn_varlen, vision_q, vision_k, vision_v, bounds, bounds, 5, 0.125, False),
        ),
        Function(
            "flash_attn_with_kvcache",
            call(flash_attn_with_kvcache, q, *caches, cache_seqlens=lengths, cache_leftpad=pads, causal=True),
            call(ops.flash_decode, q, *caches, lengths, pads, 0.125, True, 0),
        ),
    ]  # fmt: skip


@contextlib.contextmanager
def as_if_on_a_gpu(device: torch.device) -> Iterator[None]:
    """On a CPU: the functions choose Triton, look at no length (a GPU's would be out of sight), and launch nothing."""
    if device.type == "cuda":
        yield
        return
    with (
        mock.patch.object(_dispatch, "default_backend", lambda device: "triton"),
        mock.patch.object(_dispatch, "is_fake", lambda tensor: True),
        mock.patch.object(JITFunction, "run", lambda self, *args, **kwargs: None),
        _dispatch.as_if_on("sm_90"),
    ):
        yield


def host_rows(device: torch.device, dtype: torch.dtype, rounds: int = 30, batch: int = 50) -> Iterator[dict[str, Any]]:
    """A row per function as it comes. Times are 10% quantiles in microseconds: what else a machine does only ever adds."""
    x = torch.randn(4, 128, device=device).to(dtype)
    common: dict[str, Call] = {
        "add": lambda: torch.add(x, x),
        "allocate": lambda: torch.ops.llava15_benchmarks.allocate(x),
        "empty": lambda: torch.empty_like(x),
    }
    with torch.no_grad(), as_if_on_a_gpu(device):
        for function in functions(device, dtype):
            timings = host_times({"public": function.public, "operator": function.operator, **common}, device, rounds, batch)
            public, operator, add, allocate, empty = (timing.p10 for timing in timings.values())
            yield {
                "kernel": function.name,
                "public_us": round(public, 3),
                "operator_us": round(operator, 3),
                "validation_share": round(1 - operator / public, 3),
                "public_in_adds": round(public / add, 2),
                "operator_in_adds": round(operator / add, 2),
                "validation_in_adds": round((public - operator) / add, 2),
                "boundary_in_adds": round((allocate - empty) / add, 2),
                "torch_add_us": round(add, 3),
                "public_p50_us": round(timings["public"].p50, 3),
                "public_p90_us": round(timings["public"].p90, 3),
            }


class NoGraph:
    """In the place of `cuda_graphs.CapturedStep`: nothing is recorded, and nothing launched."""

    new_pool = staticmethod(object)
    new_stream = staticmethod(lambda device: None)

    def __init__(self, device: torch.device, stream: object) -> None:
        pass

    def capture(self, step: Call, pool: object) -> torch.Tensor:
        return torch.zeros_like(step())

    def replay(self) -> None:
        pass

    def wait(self) -> None:
        pass


LAYERS = 36


@torch.inference_mode()
def token_row(device: torch.device, rounds: int, tokens: int = 64, layers: int = LAYERS) -> dict[str, Any]:
    """A replayed token, by the difference between a long and a short answer, of each the quickest of all rounds."""
    # transformers: the kernels are measured without it.
    import llava15_fast
    from llava15_fast.fast import cuda_graphs

    from .generate import tiny_config

    config = tiny_config()
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = config.text_config.layer_types[:1] * layers
    model = llava15_fast.LlavaOnevision1_5ForConditionalGeneration(config).eval().to(device)
    ids, x = torch.ones(1, 8, dtype=torch.long, device=device), torch.randn(4, 128, device=device)

    def answer(new_tokens: int) -> float:
        start = time.thread_time()  # of this thread's: the machine may have other things to do
        model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        return 1e6 * (time.thread_time() - start)

    with (
        mock.patch.object(cuda_graphs, "CapturedStep", NoGraph),
        mock.patch.object(cuda_graphs.Graphs, "can_capture", staticmethod(lambda device: True)),
        llava15_fast.patched(model),
    ):
        answer(4)
        short, long = zip(*((answer(4), answer(4 + tokens)) for _ in range(max(rounds // 4, 8))), strict=True)
        token = (min(long) - min(short)) / tokens
    add = host_times({"add": lambda: torch.add(x, x)}, device, rounds, 50)["add"].p10
    return {"layers": layers, "token_us": round(token, 1), "token_in_adds": round(token / add)}


def main(argv: list[str] | None = None) -> int:
    """Prints a table and writes the JSON. Status 2: it cannot be measured; 130: stopped by hand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_time",
        description="Measures what a call of each public function costs the host, and how much of that is validation.",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="Writes the rows to this file.")
    parser.add_argument(
        "--rounds", type=positive, default=60, metavar="N", help="How often each function has its turn. By default 60."
    )
    arguments = parser.parse_args(argv)
    if llava15_kernels.INTERPRETED:
        print("TRITON_INTERPRET is set: the interpreter's cost would be measured.", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, names, token = [], functions(device, torch.bfloat16), None
    with contextlib.suppress(KeyboardInterrupt):  # what is finished is shown
        work = host_rows(device, torch.bfloat16, arguments.rounds)
        for row in track(work, "timing", total=len(names), console=Console(stderr=True), transient=True):
            rows.append(row)
        token = token_row(device, arguments.rounds)
    print(f"{'':30} {'in torch.add':>12} {'operator':>9} {'validation':>10} {'of the call':>11} {'boundary':>9}")
    for row in rows:
        print(
            f"{row['kernel']:30} {row['public_in_adds']:12.1f} {row['operator_in_adds']:9.1f} "
            f"{row['validation_in_adds']:10.1f} {row['validation_share']:11.0%} {row['boundary_in_adds']:9.1f}"
        )
    if token is not None:
        print(f"a replayed token of {token['layers']} layers, without the graph's launch: {token['token_in_adds']} torch.add")
    if arguments.json:
        if device.type == "cpu":  # ratios only
            rows, token = [without_times(row) for row in rows], token and without_times(token)
        launches = "real" if device.type == "cuda" else "stubbed"
        write_document(arguments.json, {**environment(), "launches": launches, "token": token, "rows": rows})
    return 0 if token is not None else 130


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "_us" not in key}


if __name__ == "__main__":
    sys.exit(main())
