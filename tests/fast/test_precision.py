"""16-bit decoding: teacher-forced on eager's ids, step by step over a cache.

Two 16-bit runs of one model differ, eager and sdpa of transformers among them. So a patched model may choose another token than
eager only where eager itself was not sure: where its two best logits are closer than twice its own distance from float32.
"""

import pytest
import torch

import llava15_fast

STEPS = 16
CASES = ["one_image", "two_images", "video", "batch_left_pad", "text", "text_batch_left_pad"]
WAYS = [
    *((case, "torch", dtype) for case in CASES for dtype in (torch.float16, torch.bfloat16)),
    *((case, "triton", torch.float16) for case in ("one_image", "batch_left_pad")),
    # The interpreter has no bfloat16 arithmetic.
    *((case, "triton", torch.bfloat16) for case in CASES if torch.cuda.is_available()),
]


@torch.no_grad()
def forced(model, inputs, ids):
    """Logits (B, steps, vocabulary) of every next token, when the tokens before are `ids` (B, steps)."""
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    logits = [output.logits[:, -1].float()]
    mask = inputs["attention_mask"]
    for tokens in ids[:, :-1].split(1, dim=1):
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        output = model(input_ids=tokens, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[:, -1].float())
    return torch.stack(logits, dim=1)


def cast(inputs, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def with_mask(inputs):
    return {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "backend", "dtype"), WAYS, ids=str)
def test_tokens_differ_only_at_near_ties(tiny, prompts, case, backend, dtype):
    inputs = with_mask(prompts[case])
    half = cast(inputs, dtype)
    reference = type(tiny).from_pretrained("tests/golden/tiny_hub").eval().to(tiny.device)
    tiny.to(dtype)
    prompt = half["input_ids"].shape[1]
    ids = tiny.generate(**half, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)[:, prompt:]
    exact, eager = forced(reference, inputs, ids), forced(tiny, half, ids)
    handle = llava15_fast.patch(tiny, backend)
    ours = forced(tiny, half, ids)
    assert not any(row.fallbacks for row in handle.report().rows)

    best = eager.topk(2).values
    unsure = best[..., 0] - best[..., 1] < 2 * (eager - exact).abs().amax(-1)
    differs = ours.argmax(-1) != eager.argmax(-1)
    assert not (differs & ~unsure).any(), (differs.nonzero(), unsure)
    # And logits no further from float32 than eager's own, by the error rule.
    rounding = 2 * ((exact.to(dtype) + 0.3 - 0.3) - exact.to(dtype)).abs().max().float()
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + rounding


def test_error_rule_detects_a_wrong_model(tiny, prompts):
    """One layer's attention scaled by a fifth is more than 16-bit noise."""
    inputs, ids = with_mask(prompts["text"]), torch.arange(5, 5 + STEPS, device=tiny.device)[None]
    exact = forced(tiny, inputs, ids)
    tiny.half()
    eager = forced(tiny, inputs, ids)
    tiny.model.language_model.layers[0].self_attn.scaling *= 0.8
    assert (forced(tiny, inputs, ids) - exact).abs().max() > 2 * (eager - exact).abs().max()
