"""`generate` where only a GPU can show it: real graphs, other caches, bfloat16, memory."""

import gc

import pytest
import torch

import llava15_fast
from llava15_fast.fast import generate as generation
from llava15_fast.fast.runtime import RUNTIME
from llava15_kernels.unchecked import unchecked

pytestmark = pytest.mark.gpu

OPTIONS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def replays(handle, path):
    ran = next(row for row in handle.report().rows if row.path == path).ran
    return sum(count for how, count in ran.items() if "CUDA graph" in how)


def test_graphs_are_replayed(tiny, prompt):
    expected = tiny.generate(**prompt, **OPTIONS)
    handle = llava15_fast.patch(tiny)
    found = [tiny.generate(**prompt, **OPTIONS) for _ in range(3)]
    assert all(torch.equal(ids, expected) for ids in found)
    assert replays(handle, "language_model") >= 30 and replays(handle, "visual.encode") == 2


@pytest.mark.parametrize("cache", ["offloaded", "static", "dynamic"])
def test_other_caches(tiny, prompt, cache):
    expected = tiny.generate(**prompt, **OPTIONS)
    llava15_fast.patch(tiny)
    assert torch.equal(tiny.generate(**prompt, **OPTIONS, cache_implementation=cache), expected)


def test_a_quantized_cache(tiny, prompt):
    pytest.importorskip("optimum.quanto")
    options = {**OPTIONS, "cache_implementation": "quantized"}
    expected = tiny.generate(**prompt, **options)
    llava15_fast.patch(tiny)
    assert torch.equal(tiny.generate(**prompt, **options), expected)


def test_eos_stops_where_eager_stops(tiny, prompt):
    """The host looks late whether all sequences have ended; nothing of what was computed since then may show."""
    ids = tiny.generate(**prompt, **OPTIONS)[0, prompt["input_ids"].shape[1] :]
    for eos in ids[[2, 5, 6]].tolist():
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
        expected = tiny.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True)
        with llava15_fast.patched(tiny):
            found = tiny.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(found.sequences, expected.sequences) and len(found.logits) == len(expected.logits)
        assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


def test_memory_does_not_grow(tiny, prompt):
    llava15_fast.patch(tiny)
    for _ in range(3):  # until everything is captured that will be
        tiny.generate(**prompt, **OPTIONS)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        tiny.generate(**prompt, **OPTIONS)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
    llava15_fast.unpatch(tiny)
    assert RUNTIME not in vars(tiny.model.language_model)


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 20}])
def test_no_sync_after_the_vision_tower(tiny, prompts, monkeypatch, cuda_graph, how):
    """To the last token; the grids and the mask with its padding are read before."""
    prompt = prompts["batch_left_pad"]
    options = {**OPTIONS, **how}
    llava15_fast.patch(tiny, cuda_graph=cuda_graph)
    for _ in range(3):
        tiny.generate(**prompt, **options)
    merge, finished = unchecked("triton").patch_merge, []

    def merged(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        return merge(*args, **kwargs)

    def needed(generated, eos_ids):
        torch.cuda.set_sync_debug_mode("default")
        finished.append(generated.shape[1])
        return generated.shape[1]

    monkeypatch.setattr(unchecked("triton"), "patch_merge", merged)
    monkeypatch.setattr(generation, "_tokens_needed", needed)
    try:
        tiny.generate(**prompt, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert finished == [OPTIONS["max_new_tokens"]]


def test_decode_step_does_not_sync(tiny, prompt):
    """No copy to the host and no synchronisation in a decode step without padding, graph or not."""
    for cuda_graph in (False, True):
        llava15_fast.patch(tiny, cuda_graph=cuda_graph)
        step = torch.tensor([[7]], device=tiny.device)
        with torch.no_grad():
            cache = tiny(**prompt, use_cache=True).past_key_values
            for _ in range(3):
                tiny(input_ids=step, past_key_values=cache)
            torch.cuda.set_sync_debug_mode("error")
            try:
                tiny(input_ids=step, past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        llava15_fast.unpatch(tiny)
