"""The documents: their code runs, their links lead somewhere, and the messages they explain exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava15_fast
from llava15_fast.fast import runtime

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
CHECKPOINT, SAMPLE = ROOT / "assets/scenes_checkpoint", ROOT / "assets/samples/scene_0.png"


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_runs(document, tmp_path, monkeypatch, capsys):
    """In order, in one namespace, with the small checkpoint in the place of the published one."""
    Image.open(SAMPLE).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    if not torch.cuda.is_available():  # as for a reader, who has not turned the interpreter on
        monkeypatch.setattr(runtime, "default_backend", lambda device: "torch")
    namespace = {}
    for block in blocks(document, "python"):
        block = re.sub(r'"lmms-lab/[\w.-]+"', repr(str(CHECKPOINT)), block).replace(', device_map="auto"', "")
        exec(compile(block, document.name, "exec"), namespace)
    if document.name == "README.md":
        assert "verdict: ok" in (out := capsys.readouterr().out) and "language_model" in out


def test_the_readme_patches_what_it_says():
    model, processor = AutoModelForImageTextToText.from_pretrained(CHECKPOINT), AutoProcessor.from_pretrained(CHECKPOINT)
    changed = [type(module) for module in model.modules()]
    llava15_fast.patch(model)
    assert sum(type(module) is not cls for module, cls in zip(model.modules(), changed, strict=True)) == 4
    assert processor is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_shell_commands_exist(document):
    """Every command of ours, by its help."""
    text = "".join(blocks(document, ""))
    for command in set(re.findall(r"^llava15-fast (\w+)", text, re.M)):
        run = subprocess.run([sys.executable, "-m", "llava15_fast", command, "--help"], capture_output=True, cwd=ROOT)
        assert run.returncode == 0, (document, command)
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w[\w-]*)(?=\s)", text)):
        assert re.search(rf"^{target}:", makefile, re.M), (document, target)


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            assert target.exists(), f"{document.name}: {link}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
                assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def messages():
    """All string literals of the packages, with a gap for each value that is put in."""
    found = []
    for path in sorted([*ROOT.glob("llava15_fast/**/*.py"), *ROOT.glob("kernels/llava15_kernels/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [literal.replace("\n", " ") for literal in found]


def test_the_messages_that_are_explained_exist():
    literals, rows = messages(), 0
    for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines():
        if line.startswith("| `"):
            rows += 1
            for message in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
                pattern = ".*".join(map(re.escape, message.removeprefix("PatchError: ").split("...")))
                assert any(re.search(pattern, literal) for literal in literals), f"there is no message {message!r}"
    assert rows > 30


def test_the_readme_is_short():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(text.split()) < 900
