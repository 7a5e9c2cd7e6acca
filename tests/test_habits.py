"""What outside contributors and installers meet: workflows, forms, citation, packages, examples."""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import llava15_fast
import llava15_kernels

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def test_the_workflow_only_calls_make_targets():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = set()
    for job in workflow["jobs"].values():
        for command in [step["run"] for step in job["steps"] if "run" in step]:
            values = job.get("strategy", {}).get("matrix", {}).get("target", [])
            called |= {command.replace("${{ matrix.target }}", value) for value in values or [""]}
    assert called == {"make lint", "make demo", "make test-oldest", "make test-newest", "make test-slow"}
    assert all(command.removeprefix("make ") in targets for command in called)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_parse(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])


def test_the_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == llava15_fast.__version__ == llava15_kernels.__version__
    assert f"({cited['version']})" in (ROOT / "CHANGELOG.md").read_text()


def test_contributing_is_short():
    text = re.sub(r"^```.*?^```", "", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)
    assert len(text.split()) < 600


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), from a copy of what git has, so that no build folder stays."""
    source = tmp_path_factory.mktemp("build")
    names = ["kernels", "llava15_fast", "assets", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    code = "from setuptools import build_meta as b; print(b.build_sdist('dist')); print(b.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,), (sdist,) = (source / "dist").glob("*.whl"), (source / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_wheel_and_sdist_hold_the_same_packages(built):
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"llava15_kernels/py.typed", "llava15_fast/py.typed", "llava15_kernels/linear.py"} <= names
    assert "llava15_fast/assets/scenes_checkpoint/model.safetensors" in names
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/", "examples/")) for name in names)
    for name in names:
        path = name.replace("llava15_kernels/", "kernels/llava15_kernels/").replace("llava15_fast/assets/", "assets/")
        assert ".dist-info/" in name or path in packed, path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_in_an_empty_environment(built, kind, tmp_path):
    """Without what it depends on, which comes from this environment: the demo answers, from a folder that knows no source."""
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty/bin/python"
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if kind == "sdist":  # built with this environment's setuptools
        command += ["--no-build-isolation"]
        (tmp_path / "tools").mkdir()
        for found in Path(find_spec("setuptools").origin).parents[1].glob("setuptools*"):
            (tmp_path / "tools" / found.name).symlink_to(found)
        environ["PYTHONPATH"] = str(tmp_path / "tools")
    package = str(built[kind == "sdist"])
    done = subprocess.run([*command, package], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (site,) = (tmp_path / "empty/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(str(Path(find_spec("torch").origin).parents[1]))
    code = "import llava15_fast, llava15_kernels; print(llava15_fast.__file__, llava15_kernels.__file__)"
    found = subprocess.run([python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert found.count(str(site)) == 2, found
    environ.pop("PYTHONPATH", None)
    program = tmp_path / "empty/bin/llava15-fast"
    demo = subprocess.run([program, "demo"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert demo.returncode == 0 and "a blue square" in demo.stdout, demo.stdout + demo.stderr


def run_example(name, *arguments, **environ):
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environ
    paths = [environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels")]
    environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ANSWERS = json.loads((ROOT / "assets/samples/answers.json").read_text())


def test_example_answer():
    sample = str(ROOT / "assets/samples/scene_2.png")
    output = run_example("answer.py", "--image", sample)
    assert output.splitlines()[0] == ANSWERS["scene_2.png"] and "language_model" in output


def test_example_images_and_video():
    lines = run_example("images_and_video.py").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["two images", "a video"] and all(len(line) > 20 for line in lines)


def test_example_reuse_kernel():
    assert "largest difference" in run_example("reuse_kernel.py")


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs lmms-eval: make test-others")
def test_example_evaluate(tmp_path):
    """Its wrapper reads images through qwen_vl_utils, which imports torchvision; here Pillow does that."""
    (tmp_path / "qwen_vl_utils.py").write_text(
        "def process_vision_info(talks, **kwargs):\n"
        "    parts = [part for talk in talks for message in talk for part in message['content'] if isinstance(part, dict)]\n"
        "    return [part['image'] for part in parts if part['type'] == 'image'] or None, None\n"
    )
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    run_example("evaluate.py", "--output", str(tmp_path / "out"), **home)
    (samples,) = (tmp_path / "out").rglob("*samples_scenes.jsonl")
    assert [json.loads(line)["equal"] for line in samples.read_text().splitlines()] == [1.0] * len(ANSWERS)


def test_every_example_is_run_here():
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names == set(re.findall(r'run_example\("([\w.]+)"', Path(__file__).read_text()))
