"""Which variants of the kernels requests need, and which of them a warm-up has not compiled.

    PYTHONPATH=.:kernels python tests/fast/compiled_variants.py

Triton compiles a kernel anew for other constants, dtypes, divisibility of numbers and alignment of pointers. Here it is asked
for every launch what it would be compiled for, and nothing is compiled or launched: a narrow model with the heads of the 4B and
8B is patched, warmed up, and asked requests of other sizes. What a request needs anew, a user would wait for; what is first
needed while a CUDA graph is captured would end the capture. Exit status 1 where there is any of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import llava15_fast
import llava15_kernels
from benchmarks.generate import tiny_config
from benchmarks.host_time import NoGraph, as_if_on_a_gpu
from llava15_fast import LlavaOnevision1_5ForConditionalGeneration
from llava15_fast.fast import cuda_graphs as graphs
from llava15_fast.fast import runtime
from llava15_fast.model.releases import CACHE

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@dataclass
class Recorder:
    """What was needed so far, in order: (request, kernel, whether inside a capture)."""

    known: set[tuple[str, ...]] = field(default_factory=set)
    new: list[tuple[str, str, bool]] = field(default_factory=list)
    request: str = ""
    capturing: bool = False
    binders: dict[JITFunction, Callable[..., Any]] = field(default_factory=dict)

    def launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if kernel not in self.binders:
            backend = make_backend(GPUTarget("cuda", 90, 32))
            self.binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialisation, options = self.binders[kernel](*args, **options)
        variant = (kernel.__name__, str(specialisation), str(sorted(options.items())))
        if variant not in self.known:
            self.known.add(variant)
            self.new.append((self.request, kernel.__name__, self.capturing))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        recorder = self

        class Capture(NoGraph):
            def capture(self, step: Callable[[], torch.Tensor], pool: object) -> torch.Tensor:
                recorder.capturing = True
                try:
                    return super().capture(step, pool)
                finally:
                    recorder.capturing = False

        with (
            as_if_on_a_gpu(torch.device("cpu")),
            mock.patch.object(JITFunction, "run", lambda kernel, *args, **options: recorder.launch(kernel, *args, **options)),
            mock.patch.object(runtime, "default_backend", lambda device: "triton"),
            mock.patch.object(graphs, "CapturedStep", Capture),
            mock.patch.object(graphs.Graphs, "can_capture", staticmethod(lambda device: True)),
        ):
            yield


def narrow_model() -> LlavaOnevision1_5ForConditionalGeneration:
    """Few layers and channels, heads as the 4B and 8B have them."""
    config = tiny_config()
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 32, 8
    config.text_config.max_position_embeddings = 40_000
    return LlavaOnevision1_5ForConditionalGeneration(config).to(torch.bfloat16).eval()


def requests(model: LlavaOnevision1_5ForConditionalGeneration) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ordinary ones, of sizes that a warm-up does not know."""
    config = model.config

    def ask(ids: torch.Tensor, **inputs: Any) -> Callable[[], Any]:
        return lambda: model.generate(input_ids=ids, **{**GREEDY, **inputs})

    def about(grids: list[tuple[int, int]], prompts: int = 1) -> Callable[[], Any]:
        patches = sum(h * w for h, w in grids)
        width = config.vision_config.in_channels * config.vision_config.patch_size**2
        row = torch.tensor([1] * 4 + [config.image_token_id] * (patches // 4) + [1] * 9)
        return ask(
            row.expand(prompts, -1),
            pixel_values=torch.zeros(prompts * patches, width, dtype=torch.bfloat16),
            image_grid_thw=torch.tensor([[1, h, w] for h, w in grids] * prompts),
        )

    def step_by_step() -> None:
        """As a loop of one's own would: positions are views of one tensor, at any address."""
        positions = torch.arange(60)[None]
        cache = model(input_ids=torch.ones(1, 33, dtype=torch.long), use_cache=True)[CACHE]
        for place in range(33, 37):
            model(
                input_ids=torch.ones(1, 1, dtype=torch.long),
                position_ids=positions[:, place : place + 1],
                past_key_values=cache,
            )

    for length in (16, 100, 1024, 2000, 5000):
        yield f"a prompt of {length} tokens", ask(torch.ones(1, length, dtype=torch.long))
    for prompts in (2, 3, 8, 16, 24, 48):
        mask = torch.ones(prompts, 50, dtype=torch.long)
        mask[0, :7] = 0
        yield f"{prompts} prompts, padded", ask(torch.ones_like(mask), attention_mask=mask)
    yield "2 prompts of 2000 tokens", ask(torch.ones(2, 2000, dtype=torch.long))
    yield "an image of 26 x 30 patches", about([(26, 30)])
    yield "an image of 4 x 4 patches", about([(4, 4)])
    yield "2 images", about([(40, 40), (26, 30)])
    yield "16 images of 20 x 20 patches", about([(20, 20)] * 16)
    yield "3 prompts of an image each", about([(20, 22)], 3)
    yield "prompt lookup", ask(torch.tensor([[5, 6, 7, 8] * 8]), prompt_lookup_num_tokens=3)
    yield "3 beams", ask(torch.ones(1, 20, dtype=torch.long), num_beams=3)
    yield "steps with positions of one's own", step_by_step


@torch.inference_mode()
def missing() -> tuple[int, list[tuple[str, str, bool]]]:
    """How many variants a warm-up compiles, and what is needed beyond it."""
    recorder = Recorder()
    torch.manual_seed(0)
    model = narrow_model()
    with recorder.recording(), llava15_fast.patched(model):
        recorder.request = "warm-up"
        llava15_fast.warmup(model)
        compiled, inside = len(recorder.new), [row for row in recorder.new if row[2]]
        recorder.new.clear()
        for recorder.request, run in requests(model):
            run()
    return compiled, inside + recorder.new


def main() -> int:
    """Status 0: a warm-up compiles all; 1: something is missing; 2: it cannot be found out."""
    if llava15_kernels.INTERPRETED:
        print("TRITON_INTERPRET is set: the interpreter compiles nothing.", file=sys.stderr)
        return 2
    compiled, needed = missing()
    print(f"a warm-up compiles {compiled} variants")
    for request, kernel, capturing in needed:
        print(f"missing: {kernel} for {request}{', inside a capture' if capturing else ''}")
    return 1 if needed else 0


if __name__ == "__main__":
    sys.exit(main())
