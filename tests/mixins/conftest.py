"""transformers' own tests of models and processors, run on ours: `make test-mixins`.

The mixins come from the sources of the installed transformers, in the folder TRANSFORMERS_SRC; without one nothing here is
collected. They are imported as the package `transformers_tests`. What a source distribution lacks has a stub here.
"""

import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

SOURCES = os.path.abspath(given) if (given := os.environ.get("TRANSFORMERS_SRC")) else None

ASSUMED, OURS = "the test's assumption", "ours"
FAILURES = {
    "test_bc_cache_name_forward": (ASSUMED, "the cache's older name is understood without a warning"),
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": (ASSUMED, "audio may be passed to a model that takes none"),
    "test_model_input_names": (ASSUMED, "audio may be passed to a model that takes none"),
    "test_model_rope_scaling_from_config": (ASSUMED, "random ids may hold placeholders of images that are not passed"),
    "test_multimodal_outputs_are_returned": (OURS, "image_outputs"),
    "test_processor_with_multiple_inputs": (ASSUMED, "a text may hold a placeholder of a video that is not passed"),
    "test_reverse_loading_mapping": (ASSUMED, "all tensor names that are read are written; of two formats one is"),
}
"""Test -> whose failure it is, and why. Patched or not, strictly these fail."""

collect_ignore_glob = [] if SOURCES else ["*"]


def pytest_configure(config):
    """Names transformers' markers."""
    files = "tests/test_*common.py", "tests/generation/test_utils.py", "src/transformers/testing_utils.py"
    texts = [path.read_text() for pattern in files if SOURCES for path in Path(SOURCES).glob(pattern)]
    for name in {name for text in texts for name in re.findall(r"\bmark\.(\w+)", text)} - {"parametrize", "skip", "skipif"}:
        config.addinivalue_line("markers", f"{name}: transformers'")


def stub(name, **members):
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(members)


def skipped(name, reason):
    """A mixin whose one test says why there are no others."""
    return type(name, (), {f"test_{name}": lambda self: self.skipTest(reason)})


if SOURCES:
    stub("transformers_tests", __path__=[f"{SOURCES}/tests"])
    stub("transformers_tests.exporters.test_export", ExportTesterMixin=object)  # ONNX and ExecuTorch
    if not Path(SOURCES, "tests/generation/test_utils.py").is_file():
        reason = "a source distribution has no tests/generation: set TRANSFORMERS_SRC to a full checkout"
        mixin = skipped("GenerationTesterMixin", reason)
        stub("transformers_tests.generation.test_utils", GenerationTesterMixin=mixin)
    if not Path(SOURCES, "utils/fetch_hub_objects_for_ci.py").is_file():
        stub("fetch_hub_objects_for_ci", url_to_local_path=str)


def pytest_collection_modifyitems(items):
    own = [item for item in items if item.path.parent == Path(__file__).parent]
    # Without what parameterized appends.
    names = {item: re.sub(r"_\d+(_.*)?$", "", item.name) for item in own}
    for item in own:
        if names[item] in FAILURES:
            item.add_marker(pytest.mark.xfail(strict=True, reason=": ".join(FAILURES[names[item]])))
    if len({item.path for item in own}) > 1 and (unknown := FAILURES.keys() - {*names.values()}):
        raise pytest.UsageError(f"FAILURES names tests that there are not: {sorted(unknown)}")


@pytest.fixture(autouse=True)
def subtests_are_their_test(request, monkeypatch):
    """A test would pass by subtests that fail as expected."""
    if request.node.get_closest_marker("xfail"):
        monkeypatch.setattr(request.cls, "subTest", lambda *args, **kwargs: nullcontext())
