"""Many requests of mixed shapes to one patched model: every answer must be eager's, and memory must stay flat.

    python -m benchmarks.soak --requests 1000 --json benchmarks/results/cpu/soak.json

The small checkpoint answers, patched with the torch backend on a CPU, in turns with an unpatched copy of itself in the same
process. The sequence of requests depends on nothing but their number. The resident memory is read after a tenth of the
requests, by when every kind has come many times, and after the last.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track

import llava15_fast
from assets.scenes import QUESTION, held_out_scene
from llava15_fast.tools.cli import assets_folder, load

from .rows import environment, output_file, positive, write_document

Request = tuple[list[list[dict[str, Any]]], dict[str, Any]]
"""Chats of one batch, and options of `generate`."""

KINDS = ("text", "one image", "several images", "video", "batch", "beams", "prompt lookup", "static cache")

SIZES = (28, 56, 84, 112, 140, 168, 224)

GROWTH = 0.03
"""What the resident memory may grow by between the two readings."""


def request(index: int) -> tuple[str, Request]:
    """Kind and content of request `index`."""
    rng = random.Random(f"soak/{index}")
    kind = rng.choice(KINDS)

    def picture() -> dict[str, Any]:
        return {"type": "image", "image": held_out_scene(rng.randrange(1000), rng.choice(SIZES))[0]}

    def question(words: int = 0) -> dict[str, Any]:
        return {"type": "text", "text": " ".join([QUESTION] * (1 + words))}

    contents = [[picture(), question()]]
    options: dict[str, Any] = {"max_new_tokens": rng.randint(1, 20)}
    if kind == "text":
        contents = [[question(rng.randrange(40))]]
    elif kind == "several images":
        contents = [[picture() for _ in range(rng.randint(2, 5))] + [question()]]
    elif kind == "video":
        size, first = rng.choice(SIZES), rng.randrange(1000)
        frames = [held_out_scene(first + frame, size)[0] for frame in range(rng.randint(1, 4))]
        contents = [[{"type": "video", "video": frames}, question()]]
    elif kind == "batch":
        contents = [[picture(), question(rng.randrange(4))] for _ in range(rng.randint(2, 5))] + [[question()]]
    elif kind == "beams":
        options |= {"num_beams": rng.randint(2, 3)}
    elif kind == "prompt lookup":
        options |= {"prompt_lookup_num_tokens": 3}
    elif kind == "static cache":
        options |= {"cache_implementation": "static"}
    return kind, ([[{"role": "user", "content": content}] for content in contents], options)


def answer(model: Any, processor: Any, chats: list[Any], options: dict[str, Any]) -> torch.Tensor:
    """The token ids (B, new) of a greedy or beam answer."""
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    with torch.inference_mode():
        return model.generate(**inputs, do_sample=False, **options)[:, inputs["input_ids"].shape[1] :]


def resident_mib() -> float:
    """Memory of this process that is in RAM."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(requests: int, progress: Callable[[range], Any] = iter) -> dict[str, Any]:
    """Runs the requests on both models and returns the counts, the answers that differ and the two memory readings."""
    patched, processor = load(assets_folder() / "scenes_checkpoint")
    eager = copy.deepcopy(patched)
    handle = llava15_fast.patch(patched, "torch")
    kinds: Counter[str] = Counter()
    different, tokens, memory, early = [], 0, {}, max(1, requests // 10)
    start = time.perf_counter()
    with contextlib.suppress(KeyboardInterrupt):  # what was answered counts
        for index in progress(range(requests)):
            kind, content = request(index)
            ours, expected = (answer(model, processor, *content) for model in (patched, eager))
            kinds[kind] += 1
            tokens += ours.numel()
            if not torch.equal(ours, expected):
                different.append({"request": index, "kind": kind, "ours": ours.tolist(), "eager": expected.tolist()})
            if index + 1 in (early, requests):
                memory[index + 1] = round(resident_mib(), 1)
    done = kinds.total()
    if done < requests:
        memory[done] = round(resident_mib(), 1)
    return {
        "requests": done,
        "kinds": dict(sorted(kinds.items())),
        "tokens": tokens,
        "different_answers": different,
        "resident_mib": {str(after): mib for after, mib in memory.items()},
        "growth": round(memory[done] / memory.get(early, memory[done]) - 1, 4),
        "seconds": round(time.perf_counter() - start),
        "ran": {row.path: row.ran for row in handle.report().rows},
        "fallbacks": {row.path: row.fallbacks for row in handle.report().rows if row.fallbacks},
    }


def main(argv: list[str] | None = None) -> int:
    """Prints what came out and writes the JSON. Status 1: an answer differs or memory grows; 130: stopped by hand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Sends many mixed requests to a patched model, compares every answer with eager's, and watches its memory.",
    )
    parser.add_argument("--requests", type=positive, default=1000, metavar="N", help="How many. By default 1000.")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="Writes the result to this file.")
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    result = soak(arguments.requests, lambda indices: track(indices, "requests", console=console, transient=True))
    flat = result["growth"] <= GROWTH
    first, *_, last = [*result["resident_mib"].values()] * 2
    print(f"{result['requests']} requests, {result['tokens']} tokens, {len(result['different_answers'])} answers not eager's")
    print(f"resident memory {first} MiB at first, {last} MiB at the end: {result['growth']:+.2%}")
    print(f"kinds {result['kinds']}\nfallbacks {result['fallbacks']}")
    if arguments.json:
        document = {**environment(), "transformers": transformers.__version__, "threads": torch.get_num_threads(), **result}
        write_document(arguments.json, document)
    if result["requests"] < arguments.requests:
        print(f"stopped by hand after {result['requests']} of {arguments.requests} requests", file=sys.stderr)
        return 130
    return 0 if flat and not result["different_answers"] else 1


if __name__ == "__main__":
    sys.exit(main())
