"""What goes wrong in the middle of a call is reported as it is, and the next call answers correctly."""

import copy
import weakref

import pytest
import torch
from transformers import StaticCache

import llava15_fast
from llava15_fast.fast import kv_cache, runtime
from llava15_kernels.unchecked import unchecked

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

OPS = unchecked("torch")


def fails_at(function, call, error):
    """`function`, which raises `error` at its `call`th call and never again."""
    calls = iter(range(10**9))

    def failing(*args, **kwargs):
        if next(calls) == call:
            raise error
        return function(*args, **kwargs)

    return failing


@pytest.mark.parametrize("call", [0])
def test_out_of_memory_for_the_cache(tiny, prompt, monkeypatch, call):
    expected = tiny.generate(**prompt, **OPTIONS)
    llava15_fast.patch(tiny, "torch")
    monkeypatch.setattr(runtime, "_living", weakref.WeakSet())  # other tests' models, whose graphs would be freed
    monkeypatch.setattr(kv_cache, "capacity_for", fails_at(lambda tokens: tokens + 1, call, torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        tiny.generate(**prompt, **OPTIONS)
    assert torch.equal(tiny.generate(**prompt, **OPTIONS), expected)


@pytest.mark.parametrize(
    "error", [RuntimeError("no such kernel"), KeyboardInterrupt(), torch.OutOfMemoryError("full")], ids=repr
)
@pytest.mark.parametrize("call", [0, 4, 11])
def test_error_while_decoding(tiny, prompt, monkeypatch, call, error):
    expected = tiny.generate(**prompt, **OPTIONS)
    llava15_fast.patch(tiny, "torch", cuda_graph=False)
    monkeypatch.setattr(runtime, "_living", weakref.WeakSet())
    monkeypatch.setattr(OPS, "flash_decode", fails_at(OPS.flash_decode, call, error))
    with pytest.raises(type(error)):
        tiny.generate(**prompt, **OPTIONS)
    assert torch.equal(tiny.generate(**prompt, **OPTIONS), expected)


def test_cache_is_usable_after_a_failed_step(tiny, prompt, monkeypatch):
    """What a step wrote before it failed does not count."""
    llava15_fast.patch(tiny, "torch")
    step = torch.tensor([[7]], device=tiny.device)
    with torch.no_grad():
        cache = tiny(**prompt, use_cache=True).past_key_values
        length = cache.get_seq_length()
        monkeypatch.setattr(OPS, "flash_decode", fails_at(OPS.flash_decode, 1, RuntimeError("no")))
        with pytest.raises(RuntimeError, match="no"):
            tiny(input_ids=step, past_key_values=cache)
        assert cache.get_seq_length() == length
        again = tiny(input_ids=step, past_key_values=cache).logits
        fresh = tiny(**prompt, use_cache=True).past_key_values
        assert torch.equal(again, tiny(input_ids=step, past_key_values=fresh).logits)


def test_prompt_longer_than_max_position_embeddings(tiny):
    """As eager: positions go on, transformers warns."""
    tiny.config.text_config.max_position_embeddings = 16
    ids = torch.randint(5, 480, (1, 40), device=tiny.device)
    expected = tiny.generate(ids, **OPTIONS)
    llava15_fast.patch(tiny, "torch")
    assert torch.equal(tiny.generate(ids, **OPTIONS), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is lost to the process behind an index out of range")
def test_a_static_cache_that_is_too_small(tiny, prompt):
    """As eager, whose error it is; and the next call is right."""
    cache = {"past_key_values": StaticCache(config=tiny.config, max_cache_len=prompt["input_ids"].shape[1] + 2)}
    with pytest.raises(Exception) as expected:
        tiny.generate(**prompt, **OPTIONS, **copy.deepcopy(cache))
    answer = tiny.generate(**prompt, **OPTIONS)
    llava15_fast.patch(tiny, "torch")
    with pytest.raises(expected.type):
        tiny.generate(**prompt, **OPTIONS, **cache)
    assert torch.equal(tiny.generate(**prompt, **OPTIONS), answer)


def test_cache_of_another_batch_size_raises(tiny, prompt):
    llava15_fast.patch(tiny, "torch")
    with torch.no_grad():
        cache = tiny(**prompt, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="the cache holds 1 prompts, but the input has 3"):
            tiny(input_ids=torch.ones(3, 1, dtype=torch.long, device=tiny.device), past_key_values=cache)
