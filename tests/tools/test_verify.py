"""`verify`: numbers that are right, a verdict that sees what is wrong, and a model that is left as it was."""

import contextlib
import copy
import functools
import io

import pytest
import torch
from torch import nn

import llava15_fast
from llava15_fast.fast import generate as generation
from llava15_fast.fast import text, vision
from llava15_fast.fast.runtime import RUNTIME
from llava15_fast.tools import cli
from llava15_fast.tools import verify as verification
from llava15_fast.tools.cli import assets_folder
from llava15_fast.tools.verify import Comparison, exact_float32, verify
from llava15_kernels.unchecked import unchecked

STEPS = 6
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.fixture
def endless(tiny):
    """The tiny model, whose answers never end early."""
    tiny.generation_config.update(eos_token_id=None, pad_token_id=0)
    return tiny


def state(model):
    """Everything but weights that a verification could leave behind: attributes, patches, hooks, configurations."""
    attributes = {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if callable(value) or name == "_old_forward"
    }
    sites = {
        (path, name): value.backend
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name == RUNTIME
    }
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    implementations = [module.config._attn_implementation for module in (model.model.visual, model.model.language_model)]
    # What holds fused weights, and what a patch puts in place, is made anew and does the same.
    alike = dict(attributes)
    return {key: getattr(value, "func", value) for key, value in alike.items()}, sites, hooks, implementations


def unchanged(before, after):
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("case", "dtype", "backend", "steps"),
    [
        *((case, dtype, "torch", STEPS) for case in ("two_images", "batch_left_pad") for dtype in DTYPES),
        ("one_image", DTYPES[-1], "triton", 2),
    ],
)
def test_a_sound_model_is_verified(endless, golden, case, dtype, backend, steps, prompts):
    found = verify(endless.to(dtype), prompts[case], max_new_tokens=steps, backend=backend)
    assert found.ok and not found.notes, found
    prompts = golden[case][0]["input_ids"].shape[0]
    assert found.tokens == prompts * steps
    vision_config, text_config = endless.config.vision_config, endless.config.text_config
    blocks = [f"visual.blocks.{index}" for index in range(vision_config.depth)]
    layers = [f"language_model.layers.{index}" for index in range(text_config.num_hidden_layers)]
    assert [part.name for part in found.parts] == [*blocks, *layers, "image features", "logits"]
    assert set(found.backend.values()) == {backend}
    # The errors are of this dtype: there, and not of another size.
    epsilon = torch.finfo(dtype).eps
    assert all(0 < part.eager_relative < 8 * epsilon and 0 < part.ours_relative < 8 * epsilon for part in found.parts), found
    assert "verdict: ok" in repr(found) and "visual.blocks.0" in repr(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_reference_is_the_model_in_higher_precision(endless, prompts, dtype):
    """Against a second model that is wholly in that precision."""
    inputs = prompts["two_images"]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    endless.to(dtype)
    wide = verification._reference_dtype(dtype)
    whole = copy.deepcopy(endless).to(wide)
    # transformers' norms compute in float32 in either; the pixels are those that the 16-bit model sees.
    ids = torch.arange(3, 3 + STEPS, device=endless.device)[None]
    with torch.no_grad(), verification._in_precision(endless, wide):
        found = verification._logits_at_once(endless, inputs, ids)
    with torch.no_grad():
        pixels = inputs["pixel_values"].to(dtype).to(wide)
        expected = verification._logits_at_once(whole, {**inputs, "pixel_values": pixels}, ids)
    assert found.dtype == wide
    assert float((found - expected).abs().max() / expected.abs().max()) < 3e-6


def test_the_reference_holds_one_block_at_a_time(endless, prompts, monkeypatch):
    """What is cast at once is never more than the largest block, and nothing is left when the forward is over."""
    inputs = prompts["two_images"]
    endless.half()
    held, cast = [], verification._cast

    @contextlib.contextmanager
    def watched(*args):
        with cast(*args):
            held.append(sum(p.numel() for p in endless.parameters() if p.dtype == torch.float32))
            yield

    monkeypatch.setattr(verification, "_cast", watched)
    assert verify(endless, inputs, max_new_tokens=2, backend="torch").ok
    visual, language = endless.model.visual, endless.model.language_model
    # A layer is compared together with the norm that follows it.
    layer = sum(p.numel() for p in language.layers[0].parameters()) + language.norm.weight.numel()
    blocks = [visual.patch_embed, visual.merger, *visual.blocks, endless.lm_head]
    assert max(held) <= max(layer, *(sum(p.numel() for p in block.parameters()) for block in blocks))
    assert {p.dtype for p in endless.parameters()} == {torch.float16}


OPS = unchecked("torch")


def scaled(function, factor):
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("module", "name", "part"),
    [
        (OPS, "gelu", "visual.blocks.0"),
        (OPS, "layer_norm", "visual.blocks.1"),
        (OPS, "patch_merge", "image features"),
        (text.Run, "gated", "language_model.layers.0"),
        (OPS, "rms_norm", "language_model.layers.2"),
        (text, "norm_and_rotate", "language_model.layers.1"),
        (OPS, "flash_decode", "logits"),
    ],
)
def test_wrong_kernel_is_detected(endless, prompts, monkeypatch, module, name, part, dtype):
    """Five percent in one operation; that of decoding shows in the logits alone."""
    monkeypatch.setattr(module, name, scaled(getattr(module, name), 1.05))
    found = verify(endless.to(dtype), prompts["two_images"], max_new_tokens=STEPS, backend="torch")
    bad = [row.name for row in found.parts if not row.ok]
    assert not found.ok and part in bad, found
    assert "verdict: BAD" in repr(found) and f"failure: {bad[0]}" in repr(found)
    if name == "flash_decode":
        assert bad == ["logits"]


def test_only_the_wrong_block_fails(endless, prompts, monkeypatch):
    """A wrong second block does not spoil the rows of those behind it."""
    run, second = vision.run_blocks, endless.model.visual.blocks[1]

    def wrong(module, *args):
        output = run(module, *args)
        return output + 0.05 * output.roll(1, dims=-1) if second in list(module.blocks) else output

    monkeypatch.setattr(vision, "run_blocks", wrong)
    found = verify(endless, prompts["two_images"], max_new_tokens=2, backend="torch")
    assert [part.name for part in found.parts if not part.ok][:2] == ["visual.blocks.1", "image features"]


def test_wrong_decoding_loop_is_detected(endless, prompts, monkeypatch):
    """The teacher-forced steps do not go through the decoding loop; the answer of `generate` does."""
    needed = generation._tokens_needed
    monkeypatch.setattr(generation, "_tokens_needed", lambda *args: needed(*args) - 1)
    found = verify(endless.half(), prompts["text"], max_new_tokens=STEPS, backend="torch")
    assert not found.ok and not found.forced and all(part.ok for part in found.parts)
    (difference,) = found.generated
    assert (difference.step, difference.ours, difference.allowed) == (STEPS - 1, -1, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_another_token_is_allowed_only_at_16_bit_near_ties(endless, prompts, monkeypatch, dtype):
    inputs = prompts["text"]
    ids = endless.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
    twin = int(ids) + 1
    endless.lm_head.weight.data[twin] = endless.lm_head.weight.data[ids]
    chosen = min(int(ids), twin)
    forced = verification._forced_logits

    def nudged(*args):
        logits = forced(*args)
        logits[:, 0, int(ids) + twin - chosen] += 1e-6
        return logits

    monkeypatch.setattr(verification, "_forced_logits", nudged)
    found = verify(endless.to(dtype), inputs, max_new_tokens=1, backend="torch")
    (difference,) = found.forced
    assert difference.margin == 0 and difference.eager == chosen and difference.distance > 0
    assert difference.allowed == found.ok == (dtype == torch.float16)

    def certain(*args):
        logits = forced(*args)
        logits[:, 0, 7] = 1e3
        return logits

    monkeypatch.setattr(verification, "_forced_logits", certain)
    endless.lm_head.weight.data[twin] = 0
    (difference,) = verify(endless, inputs, max_new_tokens=1, backend="torch").forced
    assert difference.ours == 7 and not difference.allowed


def test_the_rule_itself():
    torch.manual_seed(0)
    reference = torch.randn(40, 60, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = reference.to(dtype)
        assert Comparison.of("x", rounded, rounded, reference).ok
        assert not Comparison.of("x", (reference * 1.02).to(dtype), rounded, reference).ok
        broken = rounded.clone()
        broken[3, 4] = torch.nan
        found = Comparison.of("x", broken, rounded, reference)
        assert not found.ok and found.where == (3, 4)
        assert not Comparison.of("x", broken, broken, reference).ok  # eager is not finite either: nothing is shown
    # One huge value hides the others from the largest error, not from the norm.
    large = torch.cat([torch.full((1,), 3e4, dtype=torch.float64), torch.randn(9999, dtype=torch.float64) * 100])
    wrong = large.clone()
    wrong[1:] += 16 * torch.randn(9999, dtype=torch.float64).clamp(-1, 1)
    found = Comparison.of("x", wrong.half(), large.half(), large)
    assert found.ours_relative > found.relative_bound and not found.ok


@pytest.mark.parametrize("patched_before", [None, "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_model_is_restored(endless, prompts, patched_before, dtype):
    endless.to(dtype)
    if patched_before:
        llava15_fast.patch(endless, patched_before, cuda_graph=False)
    before, values = state(endless), weights(endless)
    verify(endless, prompts["one_image"], max_new_tokens=2, backend="torch")
    assert state(endless) == before and unchanged(values, weights(endless))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["patched", "reference", "block"])
def test_model_is_restored_after_an_exception(endless, prompts, monkeypatch, where, error):
    endless.half()
    handle = llava15_fast.patch(endless, "torch")
    before, values = state(endless), weights(endless)

    def failing(original, when):
        @functools.wraps(original)
        def call(*args, **kwargs):
            if when(*args):
                raise error
            return original(*args, **kwargs)

        return call

    attention = type(endless.model.language_model.layers[1].self_attn)
    owner, name, when = {
        "patched": (verification, "_forced_logits", lambda *_: True),
        "reference": (attention, "forward", lambda module, *_: module.q_proj.weight.dtype == torch.float32),
        "block": (vision, "run_blocks", lambda module, *_: not isinstance(module, nn.Module)),
    }[where]
    with monkeypatch.context() as context:
        context.setattr(owner, name, failing(getattr(owner, name), when))
        with pytest.raises(error):
            verify(endless, prompts["one_image"], max_new_tokens=2, backend="torch")
    assert state(endless) == before and unchanged(values, weights(endless))
    assert {row.backend for row in handle.report().rows} == {"torch"}


@pytest.mark.parametrize("stop", range(0, 14, 2))
def test_model_is_restored_after_out_of_memory(endless, prompts, monkeypatch, stop):
    """In the middle of bringing it to higher precision."""
    endless.half()
    before, values = state(endless), weights(endless)
    to, casts = torch.Tensor.to, iter(range(10**9))

    def full(tensor, *args, **kwargs):
        if args[:1] == (torch.float32,) and tensor.shape == (96, 48) and next(casts) == stop:
            raise torch.OutOfMemoryError("full")
        return to(tensor, *args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(torch.Tensor, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            verify(endless, prompts["text"], max_new_tokens=2, backend="torch")
    assert state(endless) == before and unchanged(values, weights(endless))


def test_narrow_and_ascii_output(endless, prompts, monkeypatch):
    """Numbers are not cut, and what cannot be shown is not tried."""
    found = verify(endless, prompts["text"], max_new_tokens=2, backend="torch")
    monkeypatch.setenv("COLUMNS", "24")
    assert all(f"{part.ours:.1e}" in repr(found) for part in found.parts) and not repr(found).isascii()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert all(f"{part.ours:.1e}" in repr(found) for part in found.parts) and repr(found).isascii()


def test_uncompared_parts_are_noted(endless, prompts):
    found = verify(endless, prompts["text"], max_new_tokens=2, backend="torch")
    assert found.ok and found.notes == ("there is no image in the inputs: the vision tower was not compared",)
    assert not any(part.name.startswith(("visual", "image")) for part in found.parts)
    endless.model.language_model.layers[0].register_forward_hook(lambda *_: None)
    found = verify(endless, prompts["one_image"], max_new_tokens=2, backend="torch")
    (note,) = found.notes
    assert found.ok and note.startswith("language_model ran without the kernels") and note in " ".join(repr(found).split())
    assert [part.name for part in found.parts if "language" in part.name] == []
    assert "a hook on " in found.backend["language_model"]


def test_an_answer_that_ends_is_compared_up_to_its_end(endless, prompts):
    inputs = prompts["batch_left_pad"]
    prompt = inputs["input_ids"].shape[1]
    free = endless.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, prompt:]
    endless.generation_config.update(eos_token_id=int(free[0, 1]))
    ends = [(row == free[0, 1]).nonzero() for row in free]
    lengths = [int(end[0]) + 1 if len(end) else STEPS for end in ends]
    found = verify(endless, inputs, max_new_tokens=STEPS, backend="torch")
    assert found.ok and found.tokens == sum(lengths) < STEPS * len(free)


def test_unverifiable_models_raise(endless, prompts):
    inputs = prompts["one_image"]
    with pytest.raises(TypeError, match="no language head"):
        verify(endless.model, inputs)
    with pytest.raises(TypeError, match="holds 0 models"):
        verify(nn.Linear(2, 2), inputs)
    with pytest.raises(ValueError, match="no input_ids"):
        verify(endless, {})
    with pytest.raises(ValueError, match="'fast'"):
        verify(endless, inputs, backend="fast")
    with pytest.raises(ValueError, match="padded on the left"):
        verify(endless, prompts["batch_right_pad"])
    with pytest.raises(ValueError, match="training mode"):
        verify(endless.train(), inputs)
    endless.eval().model.language_model.layers[1].to("meta")
    with pytest.raises(ValueError, match="not in memory"):
        verify(endless, inputs)


def test_flash_attention_is_replaced_while_verifying(endless):
    text_config = endless.model.language_model.config
    text_config._attn_implementation_internal = "flash_attention_2"
    with verification._attention_that_computes_in_any_dtype(endless):
        assert text_config._attn_implementation == "sdpa"
    assert text_config._attn_implementation == "flash_attention_2"


# The command


def test_command_verdict_ok(capsys):
    folder = str(assets_folder() / "scenes_checkpoint")
    assert cli.main(["verify", "--model", folder, "--backend", "torch"]) == 0
    out = capsys.readouterr().out
    assert "verdict: ok" in out and "visual.blocks.2" in out and "float64" in out


def test_command_verdict_bad(capsys, monkeypatch):
    monkeypatch.setattr(OPS, "gelu", scaled(OPS.gelu, 1.05))
    folder, image = assets_folder() / "scenes_checkpoint", next((assets_folder() / "samples").glob("*.png"))
    arguments = ["verify", "--model", str(folder), "--image", str(image), "--max-new-tokens", "2", "--backend", "torch"]
    assert cli.main(arguments) == 1
    assert "verdict: BAD" in capsys.readouterr().out


def test_missing_image_is_named_before_loading(capsys):
    assert cli.main(["verify", "--model", "nowhere", "--image", "none.png"]) == 2
    assert "no image file 'none.png'" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", ["older", "newer", "nothing"])
def test_tf32_is_off_meanwhile(chosen):
    """However the user has allowed rounded products, and left as the user had it."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    kept = matmul.fp32_precision, conv.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    try:
        if chosen == "older":
            torch.set_float32_matmul_precision("high")
        elif chosen == "newer":
            matmul.fp32_precision = conv.fp32_precision = "tf32"
        before = matmul.fp32_precision, conv.fp32_precision
        with exact_float32():
            assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
        assert (matmul.fp32_precision, conv.fp32_precision) == before
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision, conv.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = kept
