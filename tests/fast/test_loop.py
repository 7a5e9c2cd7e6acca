"""The decoding loop where the host learns late that all sequences have ended: what came after must not show."""

from collections import deque

import pytest
import torch

import llava15_fast
from llava15_fast import generation

LATE = 3


class Late:
    """What `_StopWatch` tells on a GPU, at its latest."""

    def __init__(self, device):
        self.seen = deque()

    def stopped(self, unfinished):
        self.seen.append(bool(unfinished.any()))
        return len(self.seen) > LATE and not self.seen.popleft()


@pytest.fixture
def late(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(generation, "_StopWatch", Late)


def prompt_of(golden, case):
    return {key: value for key, value in golden[case][0].items() if key != "labels"}


def both(model, prompt, **options):
    torch.manual_seed(7)
    expected = model.generate(**prompt, **options)
    handle = llava15_fast.patch(model, "torch")
    torch.manual_seed(7)
    found = model.generate(**prompt, **options)
    rows = {row.path: row for row in handle.report().rows}
    llava15_fast.unpatch(model)
    return expected, found, rows


@pytest.mark.parametrize("case", ["one_image", "batch_left_pad"])
@pytest.mark.parametrize("position", [0, 1, 4, 9])
def test_tokens_after_the_end_are_dropped(tiny, golden, late, case, position):
    prompt = prompt_of(golden, case)
    free = tiny.generate(**prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    # Each sequence ends at a token of its own; the last one decides.
    ends = free[:, prompt["input_ids"].shape[1] + position].unique().tolist()
    options = {
        "max_new_tokens": 16, "do_sample": False, "eos_token_id": ends, "pad_token_id": 3,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    expected, found, rows = both(tiny, prompt, **options)
    assert rows["generate"].ran == {"torch": 1}
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores) and len(found.logits) == len(expected.logits)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


def test_the_returned_cache_continues(tiny, golden, late):
    prompt = prompt_of(golden, "text")
    free = tiny.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    expected, found, _ = both(tiny, prompt, eos_token_id=int(free[0, -2]), **options)
    following = torch.cat([expected.sequences, expected.sequences[:, :3]], dim=1)
    more = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = tiny.generate(following, past_key_values=expected.past_key_values, **more)
    llava15_fast.patch(tiny, "torch")
    assert torch.equal(tiny.generate(following, past_key_values=found.past_key_values, **more), wanted)


def test_a_late_end_never_passes_the_maximum(tiny, golden, late):
    prompt = prompt_of(golden, "text")
    expected, found, _ = both(tiny, prompt, max_new_tokens=3, do_sample=False, eos_token_id=499, pad_token_id=0)
    assert torch.equal(found, expected)


def test_left_padding_is_not_read_back(tiny, golden, monkeypatch):
    """After the first step the host knows where the padding ends: masks are not looked at again."""
    looked = []
    spans_of = llava15_fast.text.spans_of
    monkeypatch.setattr(llava15_fast.text, "spans_of", lambda mask: looked.append(mask.shape[1]) or spans_of(mask))
    prompt = prompt_of(golden, "batch_left_pad")
    expected, found, _ = both(tiny, prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected) and looked == [prompt["input_ids"].shape[1]]


def test_a_hook_on_the_model_is_given_a_mask(tiny, golden):
    """Someone who listens gets what transformers passes, not our short form of it."""
    masks = []

    def hear(module, args, kwargs):
        masks.append(kwargs["attention_mask"])

    tiny.model.register_forward_pre_hook(hear, with_kwargs=True)
    prompt = prompt_of(golden, "batch_left_pad")
    expected, found, _ = both(tiny, prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected)
    half = len(masks) // 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(masks[half:], masks[:half], strict=True))


def test_a_layer_that_is_heard_still_gets_a_mask(tiny, golden):
    """The slower way under our loop: the short form becomes a mask again."""
    tiny.model.language_model.layers[0].register_forward_hook(lambda *_: None)
    prompt = prompt_of(golden, "batch_left_pad")
    expected, found, rows = both(tiny, prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected) and rows["language_model"].fallbacks and rows["generate"].ran
