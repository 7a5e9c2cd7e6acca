"""A short soak, and what the long one that is committed says."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import soak

COMMITTED = Path(__file__).parents[2] / "benchmarks/results/cpu/soak.json"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on a CPU, with float32 eager beside it")


def test_a_short_soak(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(soak, "GROWTH", 1.0)  # a few requests are still the first of their kind
    assert soak.main(["--requests", "24", "--json", str(tmp_path / "soak.json")]) == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["different_answers"] == [] and found["tokens"] > 100
    assert set(found["kinds"]) == set(soak.KINDS) and sum(found["kinds"].values()) == 24
    assert found["ran"]["visual.encode"]["torch"] > 10
    assert "0 answers not eager's" in capsys.readouterr().out


def test_a_wrong_answer_and_growing_memory_are_seen(monkeypatch, capsys):
    answer = soak.answer

    def wrong(model, *rest):
        ids = answer(model, *rest)
        return ids + ("_llava15_runtime" in vars(model))  # the patched one

    with monkeypatch.context() as context:
        context.setattr(soak, "answer", wrong)
        assert soak.main(["--requests", "2"]) == 1
    assert "2 answers not eager's" in capsys.readouterr().out
    readings = iter((100.0, 104.0))
    monkeypatch.setattr(soak, "resident_mib", lambda: next(readings))
    assert soak.main(["--requests", "2"]) == 1
    assert "+4.00%" in capsys.readouterr().out


def test_the_committed_soak_is_long_flat_and_right():
    found = json.loads(COMMITTED.read_text())
    assert found["requests"] >= 1000 and found["different_answers"] == [] and found["growth"] <= soak.GROWTH
    first, last = found["resident_mib"].values()
    assert found["growth"] == round(last / first - 1, 4)
    assert set(found["kinds"]) == set(soak.KINDS) and min(found["kinds"].values()) > 50
