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
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import llava15_kernels
from llava15_kernels import _dispatch

from .cases import cases
from .rows import environment, output_file, positive, write_document
from .timing import Call, host_times

torch.library.define("llava15_benchmarks::allocate", "(Tensor x) -> Tensor")
torch.library.impl("llava15_benchmarks::allocate", ("cpu", "cuda"), torch.empty_like)


class Recorded(TorchDispatchMode):
    """The calls of our operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "llava15":
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def functions(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Call, Call]]:
    """name -> call of a public function, and of the operator that it comes down to; of each function one case, and those of
    a norm with a residual."""
    found: dict[str, tuple[Call, Call]] = {}
    for case in cases(tiny=True):
        name = f"{case.kernel}, residual" if case.name.endswith("residual") and "norm" in case.kernel else case.kernel
        if name not in found:
            public = partial(case.ours, *case.make(device, dtype))
            with Recorded() as recorded:
                public()
            (operator,) = recorded.calls
            found[name] = public, operator
    return found


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
        for name, (call, inner) in functions(device, dtype).items():
            timings = host_times({"public": call, "operator": inner, **common}, device, rounds, batch)
            public, operator, add, allocate, empty = (timing.p10 for timing in timings.values())
            yield {
                "kernel": name,
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
    rows, token = [], None
    with contextlib.suppress(KeyboardInterrupt):  # what is finished is shown
        work, console = host_rows(device, torch.bfloat16, arguments.rounds), Console(stderr=True)
        rows.extend(track(work, "timing", total=14, console=console, transient=True))
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
