"""The command line as a user meets it: answers on stdout, one line and status 2 for a mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from llava15_fast.tools import cli

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "assets/scenes_checkpoint"
SAMPLE = sorted((ROOT / "assets/samples").glob("*.png"))[0]
ASK = ["generate", "--model", str(CHECKPOINT), "--prompt", "Describe this image.", "--max-new-tokens", "24"]


def run(*arguments, cwd, interpret=False):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-m", "llava15_fast", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The command in this process, started from an empty folder: a new process takes seconds to begin."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        try:
            status = cli.main(arguments)
        except SystemExit as exit:
            status = exit.code
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return call


def fails(result, match):
    assert result.returncode == 2, result
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1, result.stderr
    assert match in result.stderr


@pytest.mark.slow
def test_demo_compares_and_interprets(tmp_path):
    result = run("demo", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    samples = len(list((ROOT / "assets/samples").glob("*.png")))
    assert result.stdout.count("identical") == samples + 1 and "DIFFERENT" not in result.stdout
    assert str(SAMPLE) in result.stdout
    assert "torch (" in result.stdout and "triton (" in result.stdout


def test_generate_answers_on_stdout(tmp_path):
    answers = {run(*ASK, "--image", str(SAMPLE), *extra, cwd=tmp_path).stdout for extra in ([], ["--no-patch"])}
    assert len(answers) == 1 and len(answers.pop().splitlines()) == 1


def test_generate_compares(tmp_path):
    result = run(*ASK, "--image", str(SAMPLE), "--image", str(SAMPLE), "--compare", cwd=tmp_path)
    assert result.returncode == 0 and "token ids identical" in result.stderr and "rms_norm" in result.stderr


def test_warmup_runs_every_kind_of_request(tmp_path):
    result = run("warmup", "--model", str(CHECKPOINT), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [line.split("s  ")[1].split(",")[0] for line in result.stdout.splitlines()][-2:] == ["64 prompts", "total"]
    assert "fallbacks (calls)" in result.stderr and "language_model" in result.stderr


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_generate_takes_any_image_pillow_opens(here, mode):
    image = Image.new("RGB", (300, 200), (200, 30, 30))
    image = Image.new("I;16", (300, 200), 40000) if mode == "I;16" else image.convert(mode)
    path = Path(f"picture.{'tiff' if mode in ('CMYK', 'I;16') else 'png'}")
    image.save(path)
    result = here(*ASK, "--backend", "torch", "--image", path.name)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path):
    fails(run(*ASK, "--image", "nowhere.png", cwd=tmp_path), "no image file 'nowhere.png'")
    fails(run(*ASK, "--backend", "triton", cwd=tmp_path), "TRITON_INTERPRET=1")


def test_mistakes_are_one_line(here, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    data = SAMPLE.read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    fails(here(), "required")
    fails(here("dance"), "dance")
    fails(here(*ASK, "--image", "text.png"), "cannot read image 'text.png'")
    fails(here(*ASK, "--image", "half.png"), "cannot read image 'half.png'")
    fails(here(*ASK, "--max-new-tokens", "0"), "'0' is not a positive whole number")
    fails(here("generate", "--model", "./nowhere", "--prompt", "x"), "'./nowhere'")
    fails(here("generate", "--model", str(tmp_path), "--prompt", "x"), "config.json")


def test_a_corrupt_checkpoint_is_one_line(here, tmp_path):
    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(here("generate", "--model", str(tmp_path), "--prompt", "x"), "model.safetensors is not a complete")


def test_an_incomplete_checkpoint_is_refused(here, tmp_path):
    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = {name: value for name, value in load_file(CHECKPOINT / "model.safetensors").items() if "blocks.0" not in name}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fails(here("generate", "--model", str(tmp_path), "--prompt", "x"), "has 12 missing tensors")
    tensors = {name: value[:5] if name.endswith("merger.ln_q.weight") else value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = "model.visual.merger.ln_q.weight has shape (5,), expected (128,) by the configuration"
    fails(here("generate", "--model", str(tmp_path), "--prompt", "x"), message)
    (tmp_path / "tokenizer.json").write_text("{")
    fails(here("generate", "--model", str(tmp_path), "--prompt", "x"), "cannot load the tokenizer")
    fails(here("generate", "--model", "nowhere", "--prompt", "x"), "no checkpoint folder 'nowhere'")
