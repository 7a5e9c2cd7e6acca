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
