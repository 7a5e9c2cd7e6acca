"""What every benchmark owes its user: help in sentences, one clear line for a mistake, and what was finished when stopped."""

import importlib
import json
import re

import pytest
import torch

from benchmarks import cpu_ratio, rows

COMMANDS = ("gpu_check", "generate", "roofline", "report", "cpu_ratio", "host_time", "aot")
MISTAKES = {
    "roofline --config 4b --phase nothing": "there are vision 560x560",
    "cpu_ratio --select nothing": "no case has this in its name",
    "cpu_ratio --pairs 1": "at least 2",
    "host_time --rounds 0": "not a positive whole number",
    "host_time --json tests": "tests is a folder",
    "report --root tests": "not a checkout",
}


def main_of(command):
    return importlib.import_module(f"benchmarks.{command}").main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_full_sentences(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # an option a line
    with pytest.raises(SystemExit) as stopped:
        main_of(command)(["--help"])
    assert stopped.value.code == 0
    description, options = capsys.readouterr().out.split("\n\n")[1:3]
    blocks = [block for block in re.split(r"\n  (?=-)", options) if block.startswith("--")]
    assert blocks
    for said in [description, *(re.split(r"\s{2,}", block.strip())[-1] for block in blocks)]:
        assert said[0].isupper() and said.endswith("."), said


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_clear_line(arguments, capsys, monkeypatch):
    monkeypatch.chdir(rows.ROOT)
    command, *rest = arguments.split()
    if command == "host_time":
        monkeypatch.setattr("llava15_kernels.INTERPRETED", False)
    with pytest.raises(SystemExit) as stopped:
        main_of(command)(rest)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in last and MISTAKES[arguments] in last


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's run")


@needs_no_gpu
def test_ratios_that_were_finished_stay_when_stopped(tmp_path, monkeypatch):
    def ratio(call, *args):
        if found["rows"]:
            raise KeyboardInterrupt
        found["rows"] += 1
        return {"median": 1.0, "quartiles": [0.9, 1.1]}

    found = {"rows": 0}
    monkeypatch.setattr(cpu_ratio, "ratio", ratio)
    file = tmp_path / "new" / "ratio.json"
    assert cpu_ratio.main(["--json", str(file), "--select", "decode"]) == 130
    document = json.loads(file.read_text())
    assert document.keys() >= {"device", "torch", "triton", "transformers", "commit", "sources", "threads"}
    assert [(row["case"], row["verified"], row["dtype"]) for row in document["rows"]] == [("decode", True, "float32")]


@needs_no_gpu
def test_dense_masks_are_what_the_rows_of_that_name_are_against(monkeypatch):
    """One masked call a layer over all images; the other models have no masks."""
    masks = []
    right = torch.nn.functional.scaled_dot_product_attention

    def attention(query, *args, attn_mask=None, **options):
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return right(query, *args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    call = cpu_ratio.cases()["vision, 12 images"]
    layers, rows_in_all = cpu_ratio.SIZES["small"]["vision"][3], 12 * 65
    expected = {cpu_ratio.DENSE: [(rows_in_all, rows_in_all)] * layers, "sdpa": [None] * 12 * layers}
    outputs = {}
    for name, found in expected.items():
        masks.clear()
        with torch.inference_mode():
            outputs[name] = call(cpu_ratio.unpatched_model("small", name))
        assert masks == found, name
    torch.testing.assert_close(*outputs.values(), rtol=0, atol=1e-5)


@needs_no_gpu
def test_a_wrong_result_has_no_ratio(tmp_path, monkeypatch, capsys):
    from llava15_kernels.unchecked import unchecked

    right = unchecked("torch").rms_norm

    def wrong(*args, **options):
        out = right(*args, **options)
        return (out[0] * 1.0001, *out[1:]) if isinstance(out, tuple) else out * 1.0001

    monkeypatch.setattr(unchecked("torch"), "rms_norm", wrong)
    file = tmp_path / "ratio.json"
    assert cpu_ratio.main(["--json", str(file), "--pairs", "2", "--select", "prefill, padded"]) == 1
    found = json.loads(file.read_text())["rows"]
    assert len(found) == 4 and not any(row["verified"] or "median" in row for row in found)
    assert capsys.readouterr().out.count("WRONG") == 4
