"""enable, disable, and `python -m llava15_fast.run`."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import llava15_fast
from llava15_fast import LlavaOnevision1_5ForConditionalGeneration
from llava15_fast.fast.runtime import RUNTIME
from llava15_fast.patching import auto

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/golden/tiny_hub"


@pytest.fixture(autouse=True)
def disabled():
    yield
    llava15_fast.disable()


def backends(model):
    return {vars(m)[RUNTIME].backend for m in model.modules() if RUNTIME in vars(m)}


@pytest.mark.parametrize(
    "auto_class", [AutoModelForCausalLM, AutoModelForImageTextToText, LlavaOnevision1_5ForConditionalGeneration]
)
def test_models_patch_themselves(auto_class, golden, device):
    inputs = golden["one_image"][0]
    llava15_fast.enable("torch")
    model = auto_class.from_pretrained(TINY, trust_remote_code=True).eval().to(device)
    assert backends(model) == {"torch"}
    llava15_fast.disable()
    plain = auto_class.from_pretrained(TINY, trust_remote_code=True).eval().to(device)
    assert not backends(plain) and backends(model) == {"torch"}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=0, atol=1e-4)
        # Patching by hand gives the same bits.
        llava15_fast.patch(plain, "torch")
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_disable_leaves_no_trace():
    classes = (LlavaOnevision1_5ForConditionalGeneration, PreTrainedModel)
    before = [dict(vars(cls)) for cls in classes]
    llava15_fast.disable()  # nothing to undo is no error
    for backend in ("torch", "auto"):
        llava15_fast.enable(backend)
    llava15_fast.disable()
    assert [dict(vars(cls)) for cls in classes] == before


def test_enable_again_changes_the_options():
    llava15_fast.enable("auto")
    llava15_fast.enable("torch", cuda_graph=False)
    assert backends(LlavaOnevision1_5ForConditionalGeneration.from_pretrained(TINY)) == {"torch"}
    with pytest.raises(ValueError, match="backend is 'fast'"):
        llava15_fast.enable("fast")
    assert backends(LlavaOnevision1_5ForConditionalGeneration.from_pretrained(TINY)) == {"torch"}


def test_loading_info_and_subclasses():
    class Own(LlavaOnevision1_5ForConditionalGeneration):
        pass

    llava15_fast.enable("torch")
    model, info = LlavaOnevision1_5ForConditionalGeneration.from_pretrained(TINY, output_loading_info=True)
    assert not info["missing_keys"] and backends(model) == {"torch"}
    own, info = Own.from_pretrained(TINY, output_loading_info=True)
    assert isinstance(own, Own) and backends(own) == {"torch"}
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = own.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_other_models_are_left_alone(tmp_path):
    config = Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    config.vocab_size, config.head_dim = 32, 8
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    llava15_fast.enable("torch")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is Qwen3ForCausalLM and not backends(model)


def test_unpatchable_model_loads_and_logs_the_reason(caplog):
    llava15_fast.enable("torch")
    with caplog.at_level(logging.WARNING, "llava15_fast"):
        model = LlavaOnevision1_5ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float64)
    assert not backends(model) and model.dtype == torch.float64
    assert "runs without the kernels: dtype torch.float64 is not supported" in caplog.text


def test_failed_load_raises_as_usual(tmp_path):
    llava15_fast.enable("torch")
    with pytest.raises(OSError, match=str(tmp_path)):
        LlavaOnevision1_5ForConditionalGeneration.from_pretrained(tmp_path)


def test_flash_attention_2_without_its_package(monkeypatch, caplog):
    monkeypatch.setattr(auto, "is_flash_attn_2_available", lambda: False)
    llava15_fast.enable("torch")
    with caplog.at_level(logging.WARNING, "llava15_fast"):
        model = AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="flash_attention_2", trust_remote_code=True)
    assert model.config._attn_implementation == "sdpa" and backends(model) == {"torch"}
    assert "flash-attn is not installed" in caplog.text


PROGRAM = f"""
import sys
from transformers import AutoModelForCausalLM
from llava15_fast.fast.runtime import RUNTIME
import beside
assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
model = AutoModelForCausalLM.from_pretrained({str(TINY)!r}, trust_remote_code=True)
print(sorted({{vars(m)[RUNTIME].backend for m in model.modules() if RUNTIME in vars(m)}}), sys.argv[1:])
sys.exit(int(sys.argv[-1]))
"""


def run(*arguments, cwd, **environment):
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **environment}
    command = [sys.executable, "-m", "llava15_fast.run", *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("how", ["module", "script"])
def test_run(tmp_path, how):
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "beside.py").touch()
    target, cwd = (["-m", "program"], folder) if how == "module" else (["programs/program.py"], tmp_path)
    done = run(*target, "--model", "x", "-m", "3", cwd=cwd, LLAVA15_FAST_BACKEND="torch")
    assert (done.returncode, done.stdout) == (3, "['torch'] ['--model', 'x', '-m', '3']\n"), done.stderr
    assert "patched LlavaOnevision1_5ForConditionalGeneration, backend torch" in done.stderr


def test_run_sets_file_like_python(tmp_path):
    """It finds what lies beside it also after a change of the working directory."""
    (tmp_path / "my programs").mkdir()
    (tmp_path / "my programs/prögram.py").write_text("import os; os.chdir('/'); print(open(__file__).read())")
    done = run("my programs/prögram.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("import os"), done.stderr


def test_run_with_nothing_to_run(tmp_path, monkeypatch):
    from llava15_fast.run import main

    monkeypatch.chdir(tmp_path)
    for arguments in (["nowhere.py"], ["-m", "nowhere"], ["-m", "nowhere.inside"]):
        with pytest.raises(SystemExit, match=rf"^no (program|module named) '{arguments[-1]}'\nusage: python -m"):
            main(arguments)
    with pytest.raises(ImportError, match=r"No module named llava15_fast\.nowhere"):
        main(["-m", "llava15_fast.nowhere"])
    for arguments in ([], ["-m"], ["-x"], ["-m", "--model"]):
        with pytest.raises(SystemExit, match="usage: python -m"):
            main(arguments)


def test_run_with_an_unknown_backend(monkeypatch):
    from llava15_fast.run import main

    monkeypatch.setenv("LLAVA15_FAST_BACKEND", "fast")
    with pytest.raises(SystemExit, match="LLAVA15_FAST_BACKEND: backend is 'fast'"):
        main(["program.py"])
