"""The decoding loop where the host learns late that all sequences have ended: what came after must not show."""

import copy
import traceback
from collections import deque
from types import SimpleNamespace

import pytest
import torch

import llava15_fast
from llava15_fast.fast import generate as generation
from llava15_fast.fast import limits
from llava15_fast.fast.layout import Padding

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
def test_surplus_tokens_after_eos_are_discarded(tiny, prompts, late, case, position):
    prompt = prompts[case]
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


def test_the_returned_cache_continues(tiny, prompts, late):
    prompt = prompts["text"]
    free = tiny.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    expected, found, _ = both(tiny, prompt, eos_token_id=int(free[0, -2]), **options)
    following = torch.cat([expected.sequences, expected.sequences[:, :3]], dim=1)
    more = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = tiny.generate(following, past_key_values=expected.past_key_values, **more)
    llava15_fast.patch(tiny, "torch")
    assert torch.equal(tiny.generate(following, past_key_values=found.past_key_values, **more), wanted)


def test_late_eos_never_exceeds_max_length(tiny, prompts, late):
    prompt = prompts["text"]
    expected, found, _ = both(tiny, prompt, max_new_tokens=3, do_sample=False, eos_token_id=499, pad_token_id=0)
    assert torch.equal(found, expected)


def test_eos_is_polled_every_second_token():
    """Never for the token that was just queued: the host would wait for it."""
    asked, answered, end = [], [], 7
    watch = generation._StopWatch(SimpleNamespace(type="cuda"))

    def ask(unfinished):
        asked.append(step)
        return unfinished.any(), SimpleNamespace(synchronize=lambda of=step: answered.append((step, of)))

    watch.ask = ask
    for step in range(1, 40):
        if watch.stopped(torch.tensor([step < end, False])):
            break
    assert step - end < 2 * limits.EOS_POLL
    assert asked == [*range(limits.EOS_POLL, step + 1, limits.EOS_POLL)]
    assert len(answered) == len(asked) - 1 and all(now - of >= limits.EOS_POLL for now, of in answered)


def test_the_mask_is_read_once(tiny, prompts, monkeypatch):
    """Before the first step; from then on the host knows where the padding ends."""
    looked = []
    read = Padding.read
    monkeypatch.setattr(Padding, "read", lambda mask: looked.append(mask.shape[1]) or read(mask))
    prompt = prompts["batch_left_pad"]
    expected, found, _ = both(tiny, prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected) and looked == [prompt["input_ids"].shape[1]]


def test_sampling_matches_multinomial_stream():
    probabilities = torch.randn(64, 999).softmax(-1)
    probabilities[3] = torch.nn.functional.one_hot(torch.tensor(5), 999)
    torch.manual_seed(11)
    expected, state = torch.multinomial(probabilities, num_samples=1)[:, 0], torch.get_rng_state()
    torch.manual_seed(11)
    assert torch.equal(generation.draw(probabilities), expected) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("broken", [float("nan"), 0.0])
def test_invalid_probabilities_raise(broken):
    probabilities = torch.rand(3, 50)
    probabilities[1] = broken
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="not numbers, or all are 0"):
        generation.draw(probabilities)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one_image", "batch_left_pad", "two_images"])
def test_no_device_read_after_the_vision_tower(tiny, prompts, monkeypatch, case):
    """A value read from the device behind the tower makes the host wait for all of it, before the first layer is launched."""
    state, reads = {"running": False}, []
    run_blocks, next_inputs = llava15_fast.fast.vision.run_blocks, generation.Inputs.next

    def begin(*args):
        state["running"] = True
        return run_blocks(*args)

    def end(*args):
        state["running"] = False
        return next_inputs(*args)

    def watched(name):
        original = getattr(torch.Tensor, name)

        def read(tensor, *args, **kwargs):
            if state["running"] and not only_on_a_cpu():
                reads.append((name, tuple(tensor.shape), traceback.format_stack(limit=4)))
            return original(tensor, *args, **kwargs)

        return read

    for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__index__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    monkeypatch.setattr(llava15_fast.fast.vision, "run_blocks", begin)
    monkeypatch.setattr(generation.Inputs, "next", end)
    llava15_fast.patch(tiny, "triton")
    tiny.generate(**prompts[case], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert not reads, "\n".join(reads[0][2])


def only_on_a_cpu():
    """Whether Triton's interpreter is at work, or a check that is left out where the bounds are on a GPU."""
    return any("/triton/" in frame.filename or frame.name == "check_bounds" for frame in traceback.extract_stack())


def test_hook_on_the_model_receives_a_mask(tiny, prompts):
    """Someone who listens gets what transformers passes, not our short form of it."""
    masks = []

    def hear(module, args, kwargs):
        masks.append(kwargs["attention_mask"])

    tiny.model.register_forward_pre_hook(hear, with_kwargs=True)
    prompt = prompts["batch_left_pad"]
    expected, found, _ = both(tiny, prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected)
    half = len(masks) // 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(masks[half:], masks[:half], strict=True))


def test_hooked_layer_receives_a_mask(tiny, prompts):
    """The slower way under our loop: the short form becomes a mask again."""
    tiny.model.language_model.layers[0].register_forward_hook(lambda *_: None)
    prompt = prompts["batch_left_pad"]
    expected, found, rows = both(tiny, prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected) and rows["language_model"].fallbacks and rows["generate"].ran


@pytest.mark.parametrize("case", ["one_image", "batch_left_pad", "batch_right_pad"])
def test_another_default_device(tiny, prompts, case):
    """What belongs on the host is made there, wherever tensors are made by default."""
    prompt = prompts[case]
    llava15_fast.patch(tiny, "torch")
    with torch.no_grad():
        expected = tiny(**prompt).logits
        with torch.device("meta"):
            found = tiny(**prompt).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", ["one_image", "text"])
def test_patched_assistant_continues_where_it_stopped(tiny, prompts, case):
    """It is given the image once; and asked for more than one token at a time, whatever it is sure of."""
    prompt = prompts[case]
    weak = copy.deepcopy(tiny)
    weak.generation_config.assistant_confidence_threshold = 0
    with torch.no_grad():
        weak.lm_head.weight.copy_(weak.lm_head.weight.flip(0))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = tiny.generate(**prompt, **options, assistant_model=weak)
    handle = llava15_fast.patch(weak, "torch")
    assert torch.equal(tiny.generate(**prompt, **options, assistant_model=weak), expected)
    assert next(row for row in handle.report().rows if row.path == "language_model").ran
