"""Whole answers: verified before they are timed, on a tiny model and a CPU."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from transformers import CompileConfig
from triton.runtime.jit import JITFunction

import llava15_fast
import llava15_kernels.norms
from benchmarks import generate, gpu_check, rows
from benchmarks.generate import PROVIDERS, Answerer, Prompts, Shape
from llava15_kernels.unchecked import unchecked

CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's run")
pytestmark = [needs_no_gpu, pytest.mark.slow]


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
    verifier = generate.Verifier.make(model, prompts, shape)
    with PROVIDERS["patched"](model, shape, "auto") as answerer:
        assert verifier.check(answerer, "tiny")["verified"]
        ran = {backend for row in llava15_fast.PatchHandle(model).report().rows for backend in row.ran}
    assert ran == {"triton"}


def test_a_wrong_kernel_gets_no_time(tmp_path, torch_backend, monkeypatch):
    """Only while decoding: one head is off by a hundredth."""
    right = unchecked("torch").flash_decode

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out[..., -1, :] *= 0.99
        return out

    monkeypatch.setattr(unchecked("torch"), "flash_decode", wrong)
    status, found = command(tmp_path, "--images", "0", "--context", "9", "--provider", "patched", "--provider", "sdpa")
    assert status == 1
    ours, theirs = found
    assert ours["verified"] is False and "logits" in ours["error"]
    assert not [name for name in ours if isinstance(ours[name], dict) or name == "tokens_per_s"]
    assert theirs["verified"]


def test_a_patched_model_that_falls_back_gets_no_time(torch_backend):
    """Its numbers would be right, and the original's."""
    model = generate.build("tiny", CPU, torch.float32)
    model.model.language_model.layers[1].mlp.register_forward_hook(lambda module, args, output: None)
    (row,) = generate.measure(model, "tiny", Shape(0, 0, 1, 9, 5), ["patched"], 1, CPU)
    assert row["status"] == "wrong" and "fallback instead" in row["error"] and "a hook on" in row["error"]
    assert "generate_ms" not in row and "first_call_s" not in row


def test_other_ids_in_float32_are_wrong_even_if_the_logits_are_right(torch_backend, monkeypatch):
    model = generate.build("tiny", CPU, torch.float32)
    shape = Shape(0, 0, 1, 9, 5)
    right = generate.answer

    def other_ids(answerer, inputs, tokens):
        return right(answerer, inputs, tokens) + bool(answerer.options(inputs["input_ids"]))

    monkeypatch.setattr(generate, "answer", other_ids)
    found = {row["provider"]: row for row in generate.measure(model, "tiny", shape, ["sdpa", "static + compile"], 1, CPU)}
    assert found["sdpa"]["verified"] and "token ids" in found["static + compile"]["error"]


def test_an_end_before_the_last_token_is_no_measurement(monkeypatch):
    model = generate.build("tiny", CPU, torch.float32)
    prompts = Prompts.make(model.config, Shape(0, 0, 1, 9, 5), CPU)
    end = int(generate.answer(Answerer(model), prompts.inputs, 3)[0, 1])
    monkeypatch.setattr(generate, "end_token", lambda config: end)
    with pytest.raises(AssertionError, match="expected 5"):
        generate.answer(Answerer(model), prompts.inputs, 5)


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
    verifier = generate.Verifier.make(model, prompts, shape)
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


def test_given_tokens_are_decoded_one_by_one_whatever_the_logits_say(torch_backend):
    """Against a forward over the whole sequence."""
    model = generate.build("tiny", CPU, torch.float32)
    prompts = Prompts.make(model.config, Shape(0, 0, 2, 9, 5), CPU)
    seen = []
    with PROVIDERS["patched"](model, Shape(0, 0, 2, 9, 5), "torch") as answerer:
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
        logits = generate.forced_logits(answerer, prompts.inputs)
    assert [ids.shape[1] for ids in seen] == [9] + [1] * generate.FORCED
    with torch.no_grad():
        whole = model(input_ids=torch.cat(seen, dim=1)).logits[:, 8:]
    torch.testing.assert_close(logits, whole.transpose(0, 1), rtol=0, atol=1e-5)
    assert not torch.equal(logits[:-1].argmax(-1), torch.cat(seen[1:], dim=1).T), "given, not chosen"


def test_the_static_cache_stays_where_it_is(torch_backend):
    """A captured step has its addresses; what earlier answers have left in it is gone."""
    model = generate.build("tiny", CPU, torch.float32)
    shape = Shape(0, 0, 1, 9, 12)
    ids = Prompts.make(model.config, shape, CPU).inputs["input_ids"]
    with PROVIDERS[generate.COMPILED](model, shape, "torch") as answerer:
        answers = [generate.answer(answerer, {"input_ids": ids}, tokens) for tokens in (12, 1, 12)]
        (first,), (second,) = (answerer.options(ids).values() for _ in range(2))
        assert first is second and first.get_seq_length() == 0
        assert first.layers[0].keys.shape[2] == 9 + 12 and not first.layers[0].keys.any()
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[0][:, :1], answers[1])


def test_the_compiled_step_is_what_is_verified_and_compiled_once(monkeypatch):
    """As on a GPU, but for what the graph is compiled to: in answers of any length, and where the logits are asked for."""
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    answering = Answerer.generate

    def compiling(answerer, inputs, tokens, **options):
        return answering(answerer, inputs, tokens, **options, compile_config=config)

    model, shape = generate.build("tiny", CPU, torch.float32), Shape(0, 0, 1, 9, 12)
    prompts = Prompts.make(model.config, shape, CPU)
    verifier = generate.Verifier.make(model, prompts, shape)
    monkeypatch.setattr(Answerer, "generate", compiling)
    with PROVIDERS[generate.COMPILED](model, shape, "auto") as answerer:
        assert verifier.check(answerer, "compiled")["verified"]
        assert answerer.ran()["compiled"]["graphs"] == 1
        generate.time_answers(answerer, prompts, shape, 2)
        assert answerer.ran()["compiled"]["graphs"] == 1


@pytest.fixture
def counted(monkeypatch):
    """Calls of `answer`, `forget_kernels` and `forced_logits` after the right answer is known."""
    calls = []
    for name in ("answer", "forced_logits", "forget_kernels"):
        original = getattr(generate, name)
        monkeypatch.setattr(generate, name, lambda *args, name=name, original=original: calls.append(name) or original(*args))
    made = generate.Verifier.make

    def forgetting(*args):
        verifier = made(*args)
        calls.clear()
        return verifier

    monkeypatch.setattr(generate.Verifier, "make", forgetting)
    return calls


def test_the_first_calls_come_before_everything_else(torch_backend, counted):
    """What verification asks would have compiled and captured already."""
    model = generate.build("tiny", CPU, torch.bfloat16)
    arguments = ("tiny", Shape(0, 0, 1, 9, 5))
    (row,) = generate.measure(model, *arguments, ["patched"], 1, CPU, first_calls=True)
    assert row["status"] == "ok" and counted[:5] == ["forget_kernels", "answer"] * 2 + ["forced_logits"]
    assert row["kernels_compiled"] == 0 and row["first_call_s"] > 0 and row["first_call_warm_s"] > 0
    (row,) = generate.measure(model, *arguments, [generate.COMPILED], 1, CPU, first_calls=True)
    assert counted[:2] == ["answer", "forced_logits"] and row["first_call_s"] > 0
    for provider in ("patched", generate.COMPILED):
        (row,) = generate.measure(model, *arguments, [provider], 1, CPU)
        assert counted[0] == "forced_logits" and "first_call_s" not in row


def test_kernels_are_compiled_into_an_empty_cache_and_counted_once(monkeypatch):
    """And found there by the second call."""
    before, found = triton.knobs.cache.dir, []

    def compiling(*args):
        folder = Path(triton.knobs.cache.dir)
        assert folder != Path(before)
        found.append(len(list(folder.iterdir())))
        (folder / "HASH").mkdir(exist_ok=True)
        for name in ("_kernel.json", "__grp___kernel.json", "_kernel.cubin"):
            (folder / "HASH" / name).touch()

    monkeypatch.setattr(generate, "answer", compiling)
    prompts = Prompts({"input_ids": torch.zeros(1, 1)}, [], 0)
    times = generate.time_first_calls(lambda: contextlib.nullcontext(Answerer(None)), prompts, Shape())
    assert times["kernels_compiled"] == 1 and found == [0, 1]
    assert triton.knobs.cache.dir == before


def nothing():
    pass


def test_kernels_are_forgotten(monkeypatch):
    """Whatever module of ours holds them, and nobody else's."""
    ours, others = (JITFunction(nothing) for _ in range(2))
    for kernel in (ours, others):
        kernel.device_caches[0] = ("compiled",)
    monkeypatch.setattr(llava15_kernels.norms, "_added_kernel", ours, raising=False)
    monkeypatch.setattr(generate, "_added_kernel", others, raising=False)
    generate.forget_kernels()
    assert not ours.device_caches and others.device_caches


def test_what_cannot_be_verified_is_not_timed_and_the_next_shape_is(tmp_path, torch_backend, monkeypatch):
    made = generate.Verifier.make

    def too_large(model, prompts, shape):
        if shape.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(model, prompts, shape)

    monkeypatch.setattr(generate.Verifier, "make", too_large)
    status, found = command(tmp_path, "--images", "0", "--context", "9", "--batch", "2", "1", "--provider", "sdpa")
    assert status == 1 and [row["status"] for row in found] == ["cannot verify", "ok"] and "generate_ms" not in found[0]


def test_sections_of_the_gpu_check(tmp_path):
    """Every item of both, tiny; a wrong one is a failure."""
    expected = {select: {"patched", "sdpa"} for select in ("decode: ", "an image: ", "answers: ")}
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
