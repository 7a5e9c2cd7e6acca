"""The names that `import llava15_fast` gives to transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import llava15_fast


def test_names_can_be_imported_from_transformers():
    from transformers import (
        LlavaOnevision1_5Config,
        LlavaOnevision1_5ForConditionalGeneration,
        LlavaOnevision1_5Model,
    )

    assert LlavaOnevision1_5ForConditionalGeneration is llava15_fast.LlavaOnevision1_5ForConditionalGeneration
    assert LlavaOnevision1_5Config is llava15_fast.LlavaOnevision1_5Config
    assert LlavaOnevision1_5Model is llava15_fast.LlavaOnevision1_5Model


@pytest.mark.slow
def test_names_are_there_whichever_is_imported_first():
    """Parts of transformers replace the module in `sys.modules` when they are imported."""
    for first in ("import transformers", "import transformers.processing_utils", "from transformers import AutoProcessor", ""):
        code = f"{first}\nimport llava15_fast\nfrom transformers import LlavaOnevision1_5ForConditionalGeneration"
        subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def environment():
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"}


def test_other_models_processors_are_not_touched(tmp_path):
    """AutoProcessor on a folder of another model does not come to ours."""
    transformers.Qwen3Config().save_pretrained(tmp_path)
    found = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert not isinstance(found, llava15_fast.LlavaOnevision1_5Processor)
    with pytest.raises(OSError):
        transformers.AutoProcessor.from_pretrained(tmp_path / "nothing")


def test_importing_the_kernels_is_cheap_and_touches_no_device():
    code = """
import time, torch, triton, triton.language
start = time.perf_counter()
import llava15_kernels
seconds = time.perf_counter() - start
import sys
assert "transformers" not in sys.modules
assert not torch.cuda.is_initialized()
assert seconds < 0.5, seconds
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


PORT = """
import json, sys, torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3Config

class LlavaOnevision1_5Config(Qwen3Config):
    model_type = "llava_onevision1_5"

class LlavaOnevision1_5Model(transformers.Qwen3Model):
    config_class = LlavaOnevision1_5Config

class LlavaOnevision1_5ForConditionalGeneration(transformers.Qwen3ForCausalLM):
    config_class = LlavaOnevision1_5Config

    def __init__(self, config):
        super().__init__(config)
        self.model = LlavaOnevision1_5Model(config)

theirs = (LlavaOnevision1_5Config, LlavaOnevision1_5Model, LlavaOnevision1_5ForConditionalGeneration)
for cls in theirs:
    setattr(transformers, cls.__name__, cls)
AutoConfig.register("llava_onevision1_5", LlavaOnevision1_5Config)
AutoModel.register(LlavaOnevision1_5Config, LlavaOnevision1_5Model)
for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
    auto.register(LlavaOnevision1_5Config, LlavaOnevision1_5ForConditionalGeneration)

import llava15_fast

assert all(getattr(transformers, cls.__name__) is cls for cls in theirs)
tiny, folder = sys.argv[1:]
config = json.load(open(f"{tiny}/config.json"))
for spelling in ("llavaonevision1_5", "llava_onevision1_5"):
    found = AutoConfig.for_model(spelling, **{k: v for k, v in config.items() if k != "model_type"})
    assert isinstance(found, llava15_fast.LlavaOnevision1_5Config), spelling
    with torch.device("meta"):
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
            assert type(auto.from_config(found)) is llava15_fast.LlavaOnevision1_5ForConditionalGeneration
        assert type(AutoModel.from_config(found)) is llava15_fast.LlavaOnevision1_5Model
model = AutoModelForImageTextToText.from_pretrained(tiny)
llava15_fast.patch(model, "torch")
model.save_pretrained(folder)
assert json.load(open(f"{folder}/config.json"))["architectures"] == ["LlavaOnevision1_5ForConditionalGeneration"]
again = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
try:
    llava15_fast.patch(LlavaOnevision1_5ForConditionalGeneration(LlavaOnevision1_5Config(**dict.fromkeys(sizes, 2))))
except TypeError as error:
    assert "load the model with llava15_fast.LlavaOnevision1_5ForConditionalGeneration" in str(error)
else:
    raise AssertionError("theirs was patched")
"""


def test_transformers_with_its_own_class(tmp_path):
    """Ours for both spellings of the type, from the Auto classes; theirs under its name."""
    tiny = Path(__file__).parents[1] / "golden/tiny_hub"
    subprocess.run([sys.executable, "-c", PORT, tiny, tmp_path], check=True, env=environment())
