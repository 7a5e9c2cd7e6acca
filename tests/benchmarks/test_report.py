"""The document says what the committed rows say, and nothing that was not measured."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import Evidence
from benchmarks.rows import ROOT

H100 = {
    "device": "NVIDIA H100 80GB HBM3", "started": "2026-11-01T10:00:00Z", "dry_run": False, "verified": True, "status": "ok",
}  # fmt: skip


def answer(provider, config="4b", ms=3.21, **changes):
    values = {"time_to_first_token_ms": 20.5, "ms_per_token": ms, "generate_ms": 901.2}
    quantiles = {name: {"p50": value} for name, value in values.items()}
    return {
        "kind": "generate", "config": config, "provider": provider, "batch": 1, "images": 0, "image_size": 0, "context": 1024,
        "new_tokens": 64, "peak_gb": 9.1, **H100, **quantiles, **changes,
    }  # fmt: skip


def timing(kernel, case, provider, us, **changes):
    return {
        "kind": "time", "kernel": kernel, "case": case, "provider": provider, "dtype": "bfloat16", "p50_us": us, "bytes": 67e6,
        **H100, **changes,
    }  # fmt: skip


ROWS = [
    answer("patched", ms=9.99),
    answer("patched"),
    answer("sdpa", ms=18.7),
    answer("static + compile", ms=4.44, first_call_s=91.2),
    answer("patched", "8b", 5.67, context=8192),
    answer(
        "patched", "4b", 3.3, images=1, image_size=1120, context=64, new_tokens=256, first_call_s=8.5, first_call_warm_s=1.25
    ),
    *(
        timing("flash_attn_varlen_func", f"{kind} {tokens}", provider, 100, rate=rate, unit="TFLOP/s", flops=1)
        for kind, tokens, rate in (
            ("vision", 1601, 290.0), ("vision", 6401, 377.7), ("vision", 12545, 390.0),
            ("causal", 4096, 333.3), ("causal", 16384, 350.0),
        )
        for provider, rate in (("ours", rate), ("SDPA flash", rate - 60))
    ),
    *(
        timing(kernel, case, provider, us, rate=2800.0, unit="GB/s")
        for kernel, case in (("rms_norm", "4096x4096"), ("silu_and_mul", "1664x12288"), ("gelu", "6401x4096"))
        for provider, us in (("copy", 24.0), ("ours", 25.0), ("eager", 60.0), ("torch.compile", 30.0))
    ),
]  # fmt: skip
IGNORED = [
    answer("patched", ms=0.01, verified=False),
    answer("patched", ms=0.02, dry_run=True),
    answer("patched", ms=0.03, batch=4),
    timing("rms_norm", "4096x4096", "ours", 0.04, verified=False),
    timing("rms_norm", "4096x4096", "ours", 0.05, dtype="float16"),
    {"kind": "item", "status": "done", **H100},
]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what is committed, without the measurements of any GPU."""
    results = tmp_path / "benchmarks/results"
    for name in ("roofline", "cpu"):
        shutil.copytree(ROOT / "benchmarks/results" / name, results / name)
    shutil.copy(ROOT / "benchmarks/published.json", tmp_path / "benchmarks")
    (tmp_path / "docs").mkdir()
    (tmp_path / report.DOCUMENT).write_text("old")
    return tmp_path


def measured(checkout, rows):
    folder = checkout / "benchmarks/results/h100"
    folder.mkdir()
    (folder / "gpu_check.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_document_is_what_the_committed_rows_say():
    """python -m benchmarks.report"""
    assert report.main(["--check"]) == 0
    text = (ROOT / report.DOCUMENT).read_text()
    pictures = [line for line in text.splitlines() if line.startswith("![") and report.PLOTS.as_posix() in line]
    assert pictures and all((ROOT / "docs" / line.split("](")[1].rstrip(")")).is_file() for line in pictures)


def test_without_a_gpus_rows_every_measurement_is_missing(checkout):
    text = report.page(Evidence.load(checkout))
    assert "TFLOP/s (H100)" not in text and "TTFT" not in text
    assert "2.45 ms" in text and "220" in text, "what is counted and modelled"
    assert "attention.png" not in text


def test_measured_numbers_stand_where_they_belong(checkout):
    measured(checkout, [*ROWS, *IGNORED])
    text = report.page(Evidence.load(checkout))
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "3.21 ms (H100)" in lines["4B, context 1024"] and "18.70 ms (H100)" in lines["4B, context 1024"]
    assert "5.67 ms (H100)" in lines["8B, context 8192"] and lines["8B, context 8192"].endswith("| - |")
    assert "3.21 ms (H100)" in lines["4B, a token, short context"] and "21.8 ms" in lines["4B, a token, short context"]
    assert "5.67 ms (H100)" in lines["8B, decode step at context 8k"]
    one, image = "| 4B, batch 1, 1024 + 64 tokens (H100)", "| 4B, batch 1, 1 x 1120 x 1120 + 64 + 256 tokens (H100)"
    assert f"{image} | patched | - | 20.50 ms | 3.30 ms | 901.20 ms | 303 | 9.1 GB | 8.5 s, 1.2 s with compiled" in text
    assert f"{one} | sdpa | - | 20.50 ms | 18.70 ms | 901.20 ms | 53 | 9.1 GB | - |" in text
    assert f"{one} | static + compile | - | 20.50 ms | 4.44 ms | 901.20 ms | 225 | 9.1 GB | 91.2 s |" in text
    assert "333 TFLOP/s (H100)" in lines["attention, head_dim 128, causal, 4k"]
    assert "2800 GB/s (H100)" in lines["RMSNorm, 4096 x 4096"]
    assert lines["rms_norm 4096x4096 (H100)"].split(" | ")[1:] == ["96%", "80% (torch.compile) |"]
    for wrong in ("9.99", "0.01 ms", "0.02 ms"):
        assert wrong not in text, "not the last row, not verified, dry, or of another shape"


def test_two_devices_stand_side_by_side_and_are_never_compared(checkout):
    h200 = {"device": "NVIDIA H200", "commit": "abcdef0123456789", "driver": "580.1"}
    ours = timing("rms_norm", "4096x4096", "ours", 17.0, rate=3950.0, unit="GB/s", **h200)
    measured(checkout, [*ROWS, answer("patched", ms=2.5, **h200), ours])
    evidence = Evidence.load(checkout)
    text = report.page(evidence)
    assert "3.21 ms (H100), 2.50 ms (H200)" in text
    assert "96%" in text and "141%" not in text, "an H200's time as a share of an H100's copy"
    assert "NVIDIA H200 (driver 580.1, commit abcdef012345)" in text
    assert "| 4B, batch 1, 1024 + 64 tokens (H100) | patched | - | 20.50 ms | 3.21 ms |" in text
    assert "| 4B, batch 1, 1024 + 64 tokens (H200) | patched | - | 20.50 ms | 2.50 ms |" in text
    pytest.importorskip("matplotlib")
    left, _ = report.decode_picture(evidence).axes
    assert {"3.21", "2.50"} <= {text.get_text() for text in left.texts}
    assert "H100" in report.attention_picture(evidence).axes[0].get_ylabel()


def test_what_is_compared_comes_from_one_run(checkout):
    """The one that timed ours last, whichever file it is in; where ours was wrong, no older time of it stands."""
    later = {"started": "2026-11-02T10:00:00Z"}
    norm = ("rms_norm", "4096x4096")
    slower = [timing(*norm, name, us, rate=1900.0, unit="GB/s", **later) for name, us in (("copy", 32.0), ("ours", 40.0))]
    wrong = [timing("gelu", "6401x4096", "ours", 0, verified=False, **later), answer("patched", verified=False, **later)]
    measured(checkout, [*slower, *wrong, *ROWS])
    evidence = Evidence.load(checkout)
    assert {(case, provider) for case, provider in evidence.times("rms_norm")} == {(norm[1], "copy"), (norm[1], "ours")}
    assert evidence.times("rms_norm")[norm[1], "ours"]["p50_us"] == 40.0
    assert not evidence.times("gelu") and not evidence.answers(config="4b", context=1024)
    text = report.page(evidence)
    assert "80%" in text and "96%" in text and "3.21 ms" not in text


def test_the_document_is_written_and_checked(checkout):
    pytest.importorskip("matplotlib")
    measured(checkout, ROWS)
    assert report.main(["--root", str(checkout), "--check"]) == 1
    assert report.main(["--root", str(checkout)]) == 0
    text = (checkout / report.DOCUMENT).read_text()
    assert text.startswith("# Benchmarks") and report.main(["--root", str(checkout), "--check"]) == 0
    (checkout / report.DOCUMENT).write_text(text.replace("3.21 ms", "2.21 ms"))
    assert report.main(["--root", str(checkout), "--check"]) == 1, "a number that no row says"
    assert {file.stem for file in (checkout / report.PLOTS).glob("*.png")} == report.PICTURES.keys()


def test_pictures_show_the_numbers(checkout):
    """Every value that a picture is about is written or drawn in it."""
    pytest.importorskip("matplotlib")
    measured(checkout, ROWS)
    evidence = Evidence.load(checkout)
    axes = report.launches_picture(evidence).axes[0]
    expected = {str(row["counted"]["launches"]) for phase, _ in report.PHASES for row in evidence.counted("4b", phase).values()}
    assert expected <= {text.get_text() for text in axes.texts}
    left, right = report.decode_picture(evidence).axes
    assert {"3.21", "18.70", "21.8", "2.45"} <= {text.get_text() for text in left.texts}
    assert not any("3.21" in text.get_text() for text in right.texts)
    vision, causal = report.attention_picture(evidence).axes
    ours = {tuple(line.get_ydata()) for axes in (vision, causal) for line in axes.lines if line.get_label() == "ours, measured"}
    assert ours == {(290.0, 377.7, 390.0), (333.3, 350.0)}


def test_published_figures_name_their_source_and_a_measurement_of_ours():
    published = json.loads((ROOT / "benchmarks/published.json").read_text())
    for figure in published["figures"]:
        assert figure["by"] and figure["on"] and figure["source"] and figure["value"]
    from benchmarks.cases import cases

    known = {(case.kernel, case.name) for case in cases()}
    asked = {
        (figure["ours"]["kernel"], figure["ours"]["case"]) for figure in published["figures"] if "kernel" in figure["ours"]
    }
    assert asked <= known and asked
    for kind in ("vision", "causal"):
        series = published["attention"][kind]
        assert all(len(values) == len(published["attention"]["tokens"]) for name, values in series.items() if name != "title")


def test_names_of_devices():
    assert report.short_device("NVIDIA H100 80GB HBM3") == "H100" and report.short_device("AMD Instinct MI300X") == "MI300X"
    assert report.short_device("CPU (x86_64)") == "CPU (x86_64)"
    assert Path(report.PLOTS).parts[0] == "benchmarks"
