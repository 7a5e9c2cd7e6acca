"""Many requests of mixed shapes to one patched model: every answer is eager's, and memory stays flat.

    LLAVA15_SOAK=1000 python -m pytest tests/tools/test_soak.py -s

The sequence depends on nothing but its length. A run of 1000 is in `benchmarks/results/cpu/soak.json`.
"""

import copy
import gc
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

import llava15_fast
from assets.scenes import QUESTION, held_out_scene
from llava15_fast.tools.cli import assets_folder, load

REQUESTS = int(os.environ.get("LLAVA15_SOAK", "24"))
KINDS = ("text", "one image", "several images", "video", "batch", "beams", "prompt lookup", "static cache")
SIZES = (28, 56, 84, 112, 140, 168, 224)
GROWTH = 0.03
"""What the resident memory may grow by from a tenth of the requests, by when every kind has come many times, to the end."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on a CPU, with float32 eager beside it")


def request(index):
    """Kind, chats of one batch, and options of `generate`."""
    rng = random.Random(f"soak/{index}")
    kind = rng.choice(KINDS)

    def picture():
        return {"type": "image", "image": held_out_scene(rng.randrange(1000), rng.choice(SIZES))[0]}

    def question(words=0):
        return {"type": "text", "text": " ".join([QUESTION] * (1 + words))}

    contents, options = [[picture(), question()]], {"max_new_tokens": rng.randint(1, 20)}
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
        options["num_beams"] = rng.randint(2, 3)
    elif kind == "prompt lookup":
        options["prompt_lookup_num_tokens"] = 3
    elif kind == "static cache":
        options["cache_implementation"] = "static"
    return kind, [[{"role": "user", "content": content}] for content in contents], options


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_mixed_requests():
    patched, processor = load(assets_folder() / "scenes_checkpoint")
    eager = copy.deepcopy(patched)
    handle = llava15_fast.patch(patched, "torch")
    kinds, early = Counter(), None
    for index in range(REQUESTS):
        kind, chats, options = request(index)
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        with torch.inference_mode():
            ours, expected = (model.generate(**inputs, do_sample=False, **options) for model in (patched, eager))
        assert torch.equal(ours, expected), (index, kind, options)
        kinds[kind] += 1
        early = resident_bytes() if index + 1 == REQUESTS // 10 else early
    assert set(kinds) == set(KINDS)
    ran = {row.path: row.ran for row in handle.report().rows}
    assert ran["visual.encode"]["torch"] > REQUESTS // 3
    if REQUESTS >= 500:  # before, many are still the first of their kind
        assert resident_bytes() <= early * (1 + GROWTH)


def test_the_committed_soak_is_long_flat_and_right():
    found = json.loads((Path(__file__).parents[2] / "benchmarks/results/cpu/soak.json").read_text())
    assert found["requests"] >= 1000 and found["different_answers"] == [] and found["growth"] <= GROWTH
    assert set(found["kinds"]) == set(KINDS) and min(found["kinds"].values()) > 50
