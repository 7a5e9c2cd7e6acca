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

SOURCES = Path(given).absolute() if (given := os.environ.get("TRANSFORMERS_SRC")) else None

ASSUMED, OURS = "the test's assumption", "ours"
FAILURES = {
    "test_bc_cache_name_forward": (ASSUMED, "the cache's older name is understood without a warning"),
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": (ASSUMED, "audio may be passed to a model that takes none"),
    "test_model_input_names": (ASSUMED, "audio may be passed to a model that takes none"),
    "test_model_rope_scaling_from_config": (ASSUMED, "random ids may hold placeholders of images that are not passed"),
    "test_processor_with_multiple_inputs": (ASSUMED, "a text may hold a placeholder of a video that is not passed"),
    "test_reverse_loading_mapping": (ASSUMED, "all tensor names that are read are written; of two formats one is"),
}
"""Test -> whose failure it is, and why. Patched or not, strictly these fail."""

collect_ignore_glob = [] if SOURCES else ["*"]


def pytest_configure(config):
    """Names transformers' markers."""
    files = "tests/test_*common.py", "tests/generation/test_utils.py", "src/transformers/testing_utils.py"
    paths = [path for pattern in files if SOURCES for path in SOURCES.glob(pattern)]
    for name in {name for path in paths for name in re.findall(r"\bmark\.(\w+)", path.read_text())}:
        config.addinivalue_line("markers", f"{name}: transformers'")


def stub(name, **members):
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(members)


if SOURCES:
    stub("transformers_tests", __path__=[str(SOURCES / "tests")])
    stub("transformers_tests.exporters.test_export", ExportTesterMixin=object)  # to ONNX and ExecuTorch
    if not (SOURCES / "tests/generation/test_utils.py").is_file():
        reason = "a source distribution has no tests/generation: TRANSFORMERS_SRC=DIR names a checkout"
        test = {"test_generation": lambda self: self.skipTest(reason)}
        stub("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), test))
    if not (SOURCES / "utils/fetch_hub_objects_for_ci.py").is_file():
        stub("fetch_hub_objects_for_ci", url_to_local_path=str)


def pytest_collection_modifyitems(items):
    for item in items:
        name = re.sub(r"_\d+(_.*)?$", "", item.name)  # without what parameterized appends
        if name in FAILURES and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.xfail(strict=True, reason=": ".join(FAILURES[name])))


@pytest.fixture(autouse=True)
def subtests_are_their_test(request, monkeypatch):
    """A test would pass by subtests that fail as expected."""
    if request.node.get_closest_marker("xfail"):
        monkeypatch.setattr(request.cls, "subTest", lambda *args, **kwargs: nullcontext())
