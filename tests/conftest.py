"""Without a GPU the kernels run in Triton's interpreter; that is decided before they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from triton.runtime import interpreter

import llava15_fast

# What pytest-xdist tells its workers is not for the programs that tests start, nor is its width for tables.
for _name in [name for name in os.environ if name.startswith("PYTEST_XDIST") or name == "COLUMNS"]:
    del os.environ[_name]

# Eager's patch embedding is a convolution, which a GPU would round.
torch.backends.cudnn.allow_tf32 = False


def remember_builtins():
    """At each call of a kernel, and of a function in it, the interpreter looks through all of Triton's language for what to
    replace: a fifth of the tests' time. It finds the same every time."""
    names = {}

    def getmembers(owner):
        if owner not in names:
            found = inspect.getmembers(owner)
            names[owner] = [name for name, member in found if interpreter.tl.core.is_builtin(member)]
        return [(name, getattr(owner, name)) for name in names[owner]]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})


remember_builtins()

GOLDEN = Path(__file__).parent / "golden"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20260923)


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Every fresh floating-point buffer is full of NaN, so that a value a kernel forgets to write is seen."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            fresh = tensor.is_floating_point() and not tensor.is_meta and not tensor.requires_grad
            return tensor.fill_(float("nan")) if fresh else tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def golden():
    """case -> (inputs, expected tensors, description) of the original implementation."""
    tensors = load_file(GOLDEN / "golden.safetensors", device=DEVICE)
    cases = {}
    for case, description in json.loads((GOLDEN / "golden.json").read_text())["cases"].items():
        parts = [
            {key.split("/", 2)[2]: value for key, value in tensors.items() if key.startswith(f"{case}/{part}/")}
            for part in ("in", "out")
        ]
        cases[case] = (*parts, description)
    return cases


@pytest.fixture
def prompts(golden):
    """case -> what `generate` takes of it: the inputs without labels, in a dict of the test's own."""
    return {case: {name: value for name, value in parts[0].items() if name != "labels"} for case, parts in golden.items()}


@pytest.fixture
def prompt(prompts):
    """A prompt with one image."""
    return prompts["one_image"]


@pytest.fixture
def tiny():
    """The golden checkpoint, loaded afresh, in evaluation mode."""
    model = llava15_fast.LlavaOnevision1_5ForConditionalGeneration.from_pretrained(GOLDEN / "tiny_hub")
    return model.eval().to(DEVICE)


@pytest.fixture
def launches(monkeypatch):
    """Names of the Triton kernels launched in the test, in order; filled as they run."""
    names = []
    if torch.cuda.is_available():
        import triton

        def entered(metadata):
            names.append(metadata.get()["name"])

        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", entered)
    else:
        from triton.runtime.interpreter import GridExecutor

        original = GridExecutor.__call__

        def call(self, *args, **kwargs):
            names.append(self.fn.__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", call)
    return names
