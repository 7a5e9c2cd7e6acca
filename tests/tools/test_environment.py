"""`llava15-fast env`: what a bug report needs, and whether the versions are the declared ones."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
import triton
from packaging.requirements import Requirement
from rich.console import Console

import llava15_fast
from llava15_fast import versions
from llava15_fast.tools import cli
from llava15_fast.tools import env as environment

ROOT = Path(__file__).parents[2]


def shown(found):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(environment.table(found))
    return capture.get()


def test_the_ranges_are_those_of_the_installation():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    declared = {requirement.name: str(requirement.specifier) for requirement in requirements if requirement.specifier}
    declared["python"] = project["requires-python"]
    assert {name: set(text.split(",")) for name, text in environment.DECLARED.items()} == {
        name: set(text.split(",")) for name, text in declared.items()
    }


def test_installed_versions_are_reported_as_supported():
    found = environment.environment()
    versions = {row["name"]: row for row in found["versions"]}
    for name, module in (("torch", torch), ("triton", triton), ("transformers", transformers)):
        assert versions[name]["version"].split("+")[0] == module.__version__.split("+")[0]
        assert versions[name]["inside"] is True and versions[name]["declared"] == environment.DECLARED[name]
    assert versions["numpy"]["declared"] is None and versions["numpy"]["inside"] is None
    assert found["llava15_fast"].startswith(f"{llava15_fast.__version__}, ")
    assert found["interpreter"] is (not torch.cuda.is_available()) and found["backend"] == "triton"
    assert len(found["devices"]) == torch.cuda.device_count()
    text = shown(found)
    assert all(row["version"] in text for row in found["versions"] if row["version"]) and "OUTSIDE" not in text
    assert len(text.splitlines()) <= 40  # one screen


@pytest.mark.parametrize(
    ("version", "inside"),
    [("2.13.0+cpu", True), ("2.15.0.dev20260101", True), ("2.16.0", False), ("2.10.1", False), (None, False)],
)
def test_unsupported_version_is_reported(monkeypatch, version, inside):
    installed = environment.installed
    monkeypatch.setattr(environment, "installed", lambda name: version if name == "torch" else installed(name))
    found = environment.environment()
    (row,) = [row for row in found["versions"] if row["name"] == "torch"]
    assert row["inside"] is inside
    assert ("OUTSIDE" in shown(found)) is not inside
    assert ("not installed" in shown(found)) is (version is None)


def test_unwritable_cache_is_reported(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for folder, writable in ((tmp_path / "new" / "cache", True), (blocked / "cache", False)):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
        found = environment.environment()
        assert found["kernel_cache"] == {"folder": str(folder), "writable": writable}
        assert ("NOT WRITABLE" in shown(found)) is not writable
        assert found["variables"]["TRITON_CACHE_DIR"] == str(folder)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    assert environment.environment()["kernel_cache"] == {"folder": "", "writable": False}
    assert not (tmp_path / "new").exists()  # looking changes nothing


def test_the_command(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == environment.environment()
    assert cli.main(["env"]) == 0
    assert "kernel cache" in capsys.readouterr().out


def test_brackets_are_no_markup(monkeypatch):
    for folder in ("/tmp/a[/b]", "/tmp/[bold]x"):
        monkeypatch.setenv("TRITON_CACHE_DIR", folder)
        assert shown(environment.environment()).count(folder) == 2


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("transformers", "4.57.6", r"needs transformers>=5.17,<5.25; here: .*transformers 4\.57\.6"),
        ("triton", None, r"needs triton>=3.6,<3.10; here: .*triton is missing"),
        ("python", "3.10.2", r"needs python>=3.11; here: python 3\.10\.2"),
    ],
)
def test_an_old_version_is_an_error_that_names_it(monkeypatch, package, version, message):
    """Instead of some name that cannot be imported."""
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: version if name == package else real(name))
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=message):
        versions.check_versions()


def test_newer_version_warns(monkeypatch, caplog):
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: "5.99.0" if name == "transformers" else real(name))
    versions.check_versions()
    assert "transformers 5.99.0 is newer than what this was tested with: >=5.17,<5.25" in caplog.text
