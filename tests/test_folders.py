"""Each folder of the package imports only from those above it, and the plain model knows nothing of the fast path."""

import ast
from pathlib import Path

import pytest

import llava15_fast

ROOT = Path(llava15_fast.__file__).parent
ORDER = ("model", "fast", "patching", "tools")


def imported(path):
    """Folders of the package that a file imports from, wherever in it."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = (*base, *(node.module.split(".") if node.module else ()))
            yield from (names[:1] or [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llava15_fast."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_from_those_above(folder):
    files = sorted((ROOT / folder).glob("*.py"))
    assert len(files) > 3
    below = ORDER[ORDER.index(folder) + 1 :]
    found = {(path.name, name) for path in files for name in imported(path) if name in below}
    assert not found


def test_there_are_no_other_folders():
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == set(ORDER)
