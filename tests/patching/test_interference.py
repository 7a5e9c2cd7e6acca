"""The package beside Hugging Face's `kernels`, from the checkout and elsewhere, as a wheel and editable.

`make test-others` installs the library, and all is tried with it; elsewhere all is tried without, and some with a stand-in of
its name: what is tested is which of the two folders of that name an import finds, and that transformers' own use of the library
is the same with us as without.
"""

import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = find_spec("kernels")
HAS_LIBRARY = LIBRARY is not None and LIBRARY.origin is not None  # a namespace package is the checkout's source folder

PROGRAM = """
import sys
from importlib.util import find_spec
from pathlib import Path
root, where, library = sys.argv[1:]
from transformers.integrations import hub_kernels
before = {name: value for name, value in vars(hub_kernels).items() if not name.startswith("__")}
import llava15_fast, llava15_kernels, torch
assert Path(llava15_kernels.__file__).is_relative_to(where), llava15_kernels.__file__
assert Path(llava15_fast.__file__).is_relative_to(where), llava15_fast.__file__
assert {name: vars(hub_kernels)[name] for name in before} == before
spec = find_spec("kernels")
if library == "none":
    assert spec is None or spec.origin is None, spec  # at most the checkout's folder, which has nothing to import
else:
    import kernels
    assert Path(kernels.__file__).is_relative_to(library) and hasattr(kernels, "get_kernel")
model = llava15_fast.LlavaOnevision1_5ForConditionalGeneration.from_pretrained(root + "/tests/golden/tiny_hub").eval()
ids = torch.arange(5, 12)[None]
options = dict(max_new_tokens=3, do_sample=False)
expected = model.generate(ids, **options)
handle = llava15_fast.patch(model)
assert torch.equal(model.generate(ids, **options), expected) and not any(row.fallbacks for row in handle.report().rows)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's content, unpacked: what installing a pure wheel does. Built from a copy, so that no build folder stays."""
    folder = tmp_path_factory.mktemp("wheel")
    copied = ["kernels", "llava15_fast", "assets", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    (folder / "source").mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in copied), str(folder / "source")], check=True)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "source", check=True, capture_output=True)
    (built,) = (folder / "source").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
        names = archive.namelist()
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)
    return folder / "site"


CASES = [
    (installed, started, HAS_LIBRARY) for installed in ("wheel", "checkout", "editable") for started in ("root", "elsewhere")
] + ([] if HAS_LIBRARY else [("wheel", "root", True), ("checkout", "elsewhere", True)])
"""A program started from the root finds the folder `kernels/` first, from a wheel as well."""


def installed_editable():
    """By pip; the folder itself can hold the metadata of a build, too."""
    for distribution in metadata.distributions(name="llava15-fast"):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable") and origin["url"] == ROOT.as_uri():
            return True
    return False


@pytest.mark.parametrize(("installed", "started", "library"), CASES)
def test_beside_the_kernels_library(tmp_path, wheel, installed, started, library):
    if installed == "editable" and not installed_editable():
        pytest.skip("this checkout is not installed with pip install -e")
    paths = {"wheel": [wheel], "checkout": [ROOT, ROOT / "kernels"], "editable": []}[installed]
    expected = "none"
    if HAS_LIBRARY:
        expected = str(Path(LIBRARY.origin).parent)
        paths.append(Path(expected).parent)
    elif library:
        (tmp_path / "library/kernels").mkdir(parents=True)
        (tmp_path / "library/kernels/__init__.py").write_text("def get_kernel(): pass\n")
        paths.append(tmp_path / "library")
        expected = str(tmp_path / "library")
    where = wheel if installed == "wheel" else ROOT
    cwd = ROOT if started == "root" else tmp_path
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "program.py").write_text(PROGRAM)
    # A program's own folder comes first; `-c` and `-m` put the working directory there.
    command = [sys.executable, "-c", PROGRAM] if installed == "checkout" else [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run([*command, str(ROOT), str(where), expected], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
