"""What a prompt costs: no row for padding, and the language head over one position."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llava15_fast
from llava15_fast.fast import runtime

OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Products(TorchDispatchMode):
    """(rows, columns of the weight) of every matrix product."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.mm.default:
            self.shapes.append((args[0].shape[0], args[1].shape[1]))
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def prompt(prompts):
    return prompts["text_batch_left_pad"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_padding_is_not_computed(tiny, prompt, backend):
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    llava15_fast.patch(tiny, backend)
    with torch.no_grad(), Products() as products:
        tiny.model(input_ids=ids, attention_mask=mask, use_cache=True)
    assert int(mask.sum()) < mask.numel() and len(products.shapes) >= 12
    assert {rows for rows, _ in products.shapes} == {int(mask.sum())}


@pytest.mark.parametrize("loop", ["ours", "transformers"])
def test_lm_head_sees_one_position(tiny, prompt, loop):
    """Of each prompt, in the first forward and in all others."""
    options = {**OPTIONS, "max_new_tokens": 3, **({"stop_strings": None} if loop == "ours" else {"num_beams": 2})}
    handle = llava15_fast.patch(tiny, "torch")
    with torch.no_grad(), Products() as products:
        tiny.generate(**prompt, **options)
    vocabulary = tiny.config.text_config.vocab_size
    rows = len(prompt["input_ids"]) * options.get("num_beams", 1)
    assert [shape for shape in products.shapes if shape[1] == vocabulary] == [(rows, vocabulary)] * 3
    row = next(row for row in handle.report().rows if row.path == "generate")
    assert bool(row.ran) == (loop == "ours")


def test_fallback_is_logged_once_and_counted(tiny, prompt, caplog):
    runtime._log_fallback.cache_clear()
    handle = llava15_fast.patch(tiny, "torch")
    with caplog.at_level(logging.WARNING, logger="llava15_fast"):
        for _ in range(3):
            tiny.generate(**prompt, **OPTIONS, max_new_tokens=2, num_beams=2)
            tiny.generate(**prompt, **OPTIONS, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True)
    said = [record.getMessage() for record in caplog.records if "falls back" in record.getMessage()]
    assert said.count("generate falls back to transformers: neither greedy search nor sampling") == 1
    assert said.count("language_model falls back to transformers: output_hidden_states is on") == 1
    assert len(said) == len(set(said))
    rows = {row.path: row.fallbacks for row in handle.report().rows}
    assert rows["generate"]["neither greedy search nor sampling"] == 3
    assert rows["language_model"] == {"output_hidden_states is on": 6}
    assert "neither greedy search nor sampling (3)" in repr(handle.report())
