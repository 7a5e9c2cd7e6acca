"""The tuner verifies before it times, keeps the rule unless something beats it, and writes a table that loads."""

import json

import pytest
import torch

from benchmarks import tune
from benchmarks.timing import Timing
from llava15_kernels import tuned
from llava15_kernels.flash_attn import FlashConfig

RULE = {"block_n": 64, "num_warps": 4, "num_stages": 3, "waves": 2}
FAST = {**RULE, "block_n": 32}
"""A neighbour of the rule, which are tried first."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is a CPU's")


def sweep(monkeypatch, tmp_path, microseconds, *arguments):
    """(status, document) of a dry run whose clock is a function of the decode configuration in use."""
    key = (128, torch.float16, "interpreter")

    def clock(call, device, budget):
        return Timing.of([microseconds(tuned.tuned("flash_decode", key) or RULE)], "clock")

    monkeypatch.setattr(tune, "device_time", clock)
    file = tmp_path / "table.json"
    status = tune.main(["--dry-run", "--op", "flash_decode", "--out", str(file), *arguments])
    return status, json.loads(file.read_text())


def test_a_faster_configuration_enters_the_table(monkeypatch, tmp_path):
    status, document = sweep(monkeypatch, tmp_path, lambda config: 5.0 if config == FAST else 10.0)
    assert status == 0
    (entry,) = document["configurations"]
    assert entry["config"] == FAST and entry["evidence"]["rule"] == RULE and entry["evidence"]["relative_time"] == 0.5
    assert (entry["op"], entry["head_dim"], entry["dtype"], entry["architecture"]) == (
        "flash_decode",
        128,
        "float16",
        "interpreter",
    )

    with pytest.raises(ValueError, match="dry run"):
        tuned.load(tmp_path / "table.json")
    document["measured"]["dry_run"] = False
    (tmp_path / "table.json").write_text(json.dumps(document))
    assert tuned.load(tmp_path / "table.json") == {("flash_decode", (128, torch.float16, "interpreter")): FAST}


def test_the_rule_stays_where_nothing_beats_its_noise(monkeypatch, tmp_path):
    turns = iter(range(10**6))
    # The rule's second timing differs by a tenth from its first; a candidate is better by a twentieth.
    status, document = sweep(
        monkeypatch, tmp_path, lambda config: 9.5 if config != RULE else 10.0 + (next(turns) >= 4)
    )  # fmt: skip
    assert status == 0 and document["configurations"] == []


def test_a_candidate_with_a_wrong_result_is_not_timed(monkeypatch, tmp_path, capsys):
    original = tune.Checker.check_ours

    def check(self):
        assert tuned.tuned("flash_decode", (128, torch.float16, "interpreter")) != FAST, "wrong result"
        original(self)

    monkeypatch.setattr(tune.Checker, "check_ours", check)
    _, document = sweep(monkeypatch, tmp_path, lambda config: 5.0 if config == FAST else 10.0)
    assert document["configurations"] == [] and "wrong result" in capsys.readouterr().err


def test_attention_is_asked_too(monkeypatch, tmp_path):
    arguments = ["--dry-run", "--op", "flash_attn_varlen", "--head-dim", "64", "--out", str(tmp_path / "table.json")]
    assert tune.main(arguments) == 0
    rule = FlashConfig.choose(64, torch.float16, "interpreter")
    monkeypatch.setattr(FlashConfig, "choose", staticmethod(lambda *_: rule))
    assert tune.main(arguments) == 1  # a launcher that does not ask the table
