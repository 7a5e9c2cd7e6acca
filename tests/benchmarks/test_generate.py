"""Whole answers: verified before they are timed, on a tiny model and a CPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

import llava15_fast
from benchmarks import generate, gpu_check, rows
from benchmarks.generate import PROVIDERS, Answerer, Prompts, Shape
from llava15_fast import text

CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's run")
pytestmark = needs_no_gpu


@pytest.fixture
def torch_backend(monkeypatch):
    """The kernels in the interpreter are tested elsewhere, and slow."""
    patched = llava15_fast.patched
    monkeypatch.setattr(llava15_fast, "patched", lambda model, backend, **options: patched(model, "torch", **options))


def command(folder, *arguments):
    status = generate.main(["--config", "tiny", "--out", str(folder), "--new-tokens", "5", "--repeats", "2", *arguments])
    return status, rows.read(folder / "generate.jsonl")


def test_every_provider_and_shape(tmp_path, torch_backend):
    status, found = command(tmp_path, "--image-size", "56", "--images", "0", "1", "--batch", "1", "2", "--context", "9")
    assert status == 0
    text_rows, image_rows = ([row for row in found if row["images"] == images] for images in (0, 1))
    assert [row["provider"] for row in text_rows] == [*PROVIDERS] * 2
    assert [row["provider"] for row in image_rows] == [*PROVIDERS] * 2
    for row in found:
        assert row["status"] == "ok" and row["verified"] and row["dry_run"], row
        assert ("ran" in row) == row["provider"].startswith("patched")
        assert row.keys() >= {"device", "driver", "torch", "triton", "transformers", "commit", "sources", "dtype"}
        assert row["verified_prompts"] == row["batch"] and row["logits_error"] < 1e-5
        for name in ("time_to_first_token_ms", "generate_ms", "ms_per_token"):
            assert row[name]["p10"] <= row[name]["p50"] <= row[name]["p90"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_per_token"]["p50"], rel=0.01)
        assert row["prompt_tokens"] == 9 + row["images"] * (4 + 2)
        assert ("vision_ms" in row) == ("preprocessing_ms" in row) == (row["images"] == 1)
    assert len((tmp_path / "generate.log").read_text().splitlines()) == len(found) + 1


def test_the_kernels_themselves_are_verified(monkeypatch):
    """In the interpreter: the teacher-forced logits and the ids of the patched model."""
    monkeypatch.setattr(generate, "FORCED", 1)
    model = generate.build("tiny", CPU, torch.float32)
    shape = Shape(28, 1, 1, 2, 2)
    prompts = Prompts.make(model.config, shape, CPU)
    verifier = generate.Verifier.make(model, prompts, shape, generate.end_token(model.config))
    with PROVIDERS["patched"](model, shape, "auto") as answerer:
        assert verifier.check(answerer, "tiny")["verified"]
        ran = {backend for row in llava15_fast.patching.PatchHandle(model).report().rows for backend in row.ran}
    assert ran == {"triton"}


def test_a_wrong_kernel_gets_no_time(tmp_path, torch_backend, monkeypatch):
    """Only while decoding: the last head's keys are forgotten."""
    right = text.flash_attn_with_kvcache

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out[..., -1, :] *= 0.99
        return out

    monkeypatch.setattr(text, "flash_attn_with_kvcache", wrong)
    status, found = command(tmp_path, "--images", "0", "--context", "9", "--provider", "patched", "--provider", "sdpa")
    assert status == 1
    ours, theirs = found
    assert ours["verified"] is False and "logits" in ours["error"]
    assert not [name for name in ours if isinstance(ours[name], dict) or name in ("first_call_s", "tokens_per_s")]
    assert theirs["verified"]


def test_a_patched_model_that_falls_back_gets_no_time(torch_backend):
    """Its numbers would be right, and the original's."""
    model = generate.build("tiny", CPU, torch.float32)
    model.model.language_model.layers[1].mlp.register_forward_hook(lambda module, args, output: None)
    (row,) = generate.measure(model, "tiny", Shape(0, 0, 1, 9, 5), ["patched"], 1, CPU)
    assert row["status"] == "wrong" and "the original ran instead" in row["error"] and "a hook sits on" in row["error"]
    assert "generate_ms" not in row and "first_call_s" not in row


def test_other_ids_in_float32_are_wrong_even_if_the_logits_are_right(torch_backend, monkeypatch):
    model = generate.build("tiny", CPU, torch.float32)
    shape = Shape(0, 0, 1, 9, 5)
    right = generate.answer
    monkeypatch.setattr(generate, "answer", lambda answerer, *rest: right(answerer, *rest) + bool(answerer.options))
    found = {row["provider"]: row for row in generate.measure(model, "tiny", shape, ["sdpa", "static + compile"], 1, CPU)}
    assert found["sdpa"]["verified"] and "token ids" in found["static + compile"]["error"]


def test_an_end_before_the_last_token_is_no_measurement(torch_backend):
    model = generate.build("tiny", CPU, torch.float32)
    prompts = Prompts.make(model.config, Shape(0, 0, 1, 9, 5), CPU)
    end = int(generate.answer(Answerer(model, {}), prompts.inputs, 3, generate.end_token(model.config))[0, 1])
    with pytest.raises(AssertionError, match="expected 5"):
        generate.answer(Answerer(model, {}), prompts.inputs, 5, end)


def test_a_competitor_that_cannot_run_is_no_failure_and_ours_is(tmp_path, torch_backend, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of resources\nand so on")

    monkeypatch.setitem(PROVIDERS, "eager", broken)
    status, found = command(tmp_path, "--images", "0", "--context", "9", "--provider", "eager", "--provider", "sdpa")
    assert status == 0 and [row["status"] for row in found] == ["cannot run", "ok"]
    assert found[0]["error"] == "RuntimeError: out of resources"
    monkeypatch.setitem(PROVIDERS, "patched", broken)
    status, found = command(tmp_path / "ours", "--images", "0", "--context", "9", "--provider", "patched")
    assert status == 1 and found[0]["status"] == "failed"


def test_what_was_finished_stays_when_stopped(tmp_path, torch_backend, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(PROVIDERS, "eager", stopped)
    status, found = command(tmp_path, "--images", "0", "--context", "9", "--provider", "patched", "--provider", "eager")
    assert status == 130 and [row["provider"] for row in found] == ["patched"]


def test_float32_weights_and_back_are_the_same_bits():
    model = generate.build("tiny", CPU, torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with generate.in_float32(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_bfloat16_is_held_to_the_error_rule(torch_backend, monkeypatch):
    model = generate.build("tiny", CPU, torch.bfloat16)
    measured = generate.measure(model, "tiny", Shape(56, 1, 2, 9, 4), ["patched", "eager"], 1, CPU)
    for row in measured:
        assert row["verified"] and min(row["logits_error"], row["sdpa_logits_error"]) > 0, row


def test_only_so_many_prompts_are_verified_as_float32_has_room_for(monkeypatch):
    model = generate.build("tiny", CPU, torch.float32)
    shape = Shape(56, 1, 3, 9, 4)
    prompts = Prompts.make(model.config, shape, CPU)
    monkeypatch.setattr(generate, "VERIFIED_PATCHES", 2 * 16)
    verifier = generate.Verifier.make(model, prompts, shape, generate.end_token(model.config))
    assert verifier.inputs["input_ids"].shape[0] == 2 and verifier.inputs["pixel_values"].shape[0] == 32


def test_prompts_are_as_asked():
    config = generate.config_of("4b")
    prompts = Prompts.make(config, Shape(560, 2, 1, 64, 2), CPU)
    assert prompts.patches == 2 * 1600 and prompts.inputs["pixel_values"].shape == (3200, 588)
    assert int((prompts.inputs["input_ids"] == config.image_token_id).sum()) == 800
    assert prompts.images[0].dtype == np.uint8 and prompts.images[0].std() > 50
    with pytest.raises(ValueError, match="multiple of 28"):
        Prompts.make(config, Shape(100, 1), CPU)


MISTAKES = {
    "--new-tokens 1": "at least 2",
    "--config nowhere": "neither 4b, 8b or tiny nor a folder with a checkpoint",
    "--image-size 100": "multiple of 28",
    "--images -1": "not a positive whole number",
    "--out README.md": "README.md is a file",
    "--provider nobody": "invalid choice",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_clear_line(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(rows.ROOT)
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--config", "tiny", "--out", str(tmp_path), *arguments.split()])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in last and MISTAKES[arguments] in last


def test_another_run_adds_to_the_file(tmp_path, torch_backend):
    arguments = ["--images", "0", "--context", "9", "--provider", "sdpa"]
    command(tmp_path, *arguments)
    status, found = command(tmp_path, *arguments)
    assert status == 0 and len(found) == 2
    same = ("prompt_tokens", "provider", "batch", "dtype", "logits_error", "sources")
    assert [found[0][name] for name in same] == [found[1][name] for name in same]


def test_the_first_call_comes_before_everything_else(torch_backend, monkeypatch):
    """What verification asks would have compiled and captured already."""
    asked = []
    for name in ("answer", "forced_logits"):
        original = getattr(generate, name)
        monkeypatch.setattr(generate, name, lambda *args, name=name, original=original: asked.append(name) or original(*args))
    model = generate.build("tiny", CPU, torch.bfloat16)
    shape = Shape(0, 0, 1, 9, 5)
    made = generate.Verifier.make

    def forgetting(*args):
        verifier = made(*args)
        asked.clear()
        return verifier

    monkeypatch.setattr(generate.Verifier, "make", forgetting)
    (row,) = generate.measure(model, "tiny", shape, ["patched"], 1, CPU)
    assert asked[:2] == ["answer", "forced_logits"] and row["kernels_compiled"] == 0 and row["first_call_s"] > 0


def test_kernels_are_compiled_into_an_empty_cache_and_counted_once(monkeypatch):
    before = triton.knobs.cache.dir

    def compiling(*args):
        folder = Path(triton.knobs.cache.dir)
        assert folder != Path(before) and not list(folder.iterdir())
        (folder / "HASH").mkdir()
        for name in ("_kernel.json", "__grp___kernel.json", "_kernel.cubin"):
            (folder / "HASH" / name).touch()

    monkeypatch.setattr(generate, "answer", compiling)
    prompts = Prompts({"input_ids": torch.zeros(1, 1)}, [], 0)
    assert generate.time_first_call(None, prompts, Shape(), 0, ours=True)["kernels_compiled"] == 1
    assert triton.knobs.cache.dir == before


def test_what_cannot_be_verified_is_not_timed_and_the_next_shape_is(tmp_path, torch_backend, monkeypatch):
    made = generate.Verifier.make

    def too_large(model, prompts, shape, end):
        if shape.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(model, prompts, shape, end)

    monkeypatch.setattr(generate.Verifier, "make", too_large)
    status, found = command(tmp_path, "--images", "0", "--context", "9", "--batch", "2", "1", "--provider", "sdpa")
    assert status == 1 and [row["status"] for row in found] == ["cannot verify", "ok"] and "generate_ms" not in found[0]


def test_sections_of_the_gpu_check(tmp_path):
    """Every item of both, tiny; a wrong one is a failure."""
    expected = {"decode: ": {"patched", "sdpa"}, "answers: ": {"patched", "sdpa"}}
    expected["other ways: "] = PROVIDERS.keys() - expected["decode: "]
    for select, providers in expected.items():
        folder = tmp_path / select.strip(": ")
        status = gpu_check.main(["--dry-run", "--out", str(folder), "--select", select])
        found = rows.read(folder / "gpu_check.jsonl")
        assert status == 0, [row for row in found if gpu_check.is_failure(row)]
        measured = [row for row in found if row["kind"] == "generate"]
        assert measured and all(row["dry_run"] and row["config"] == "tiny" for row in measured)
        assert {row["provider"] for row in measured} == providers
    assert gpu_check.is_failure({"kind": "generate", "status": "failed", "provider": "patched"})
    assert gpu_check.is_failure({"kind": "generate", "status": "wrong", "provider": "sdpa", "verified": False})
    assert not gpu_check.is_failure({"kind": "generate", "status": "cannot run", "provider": "eager", "verified": False})
    names = [name for name, _ in gpu_check.items_of(gpu_check.Run(None, torch.device("cuda"), 0), "")]
    assert names.index("decode: 4b behind 1024 tokens") < names.index("decode: 8b behind 1024 tokens")
    assert names.index("decode: 8b behind 1024 tokens") < min(i for i, name in enumerate(names) if name.startswith("kernels: "))
    json.dumps(found)
