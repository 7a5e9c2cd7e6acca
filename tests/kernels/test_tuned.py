"""Launch configurations from a table: asked for, checked, and used for the keys it holds."""

import json

import pytest
import torch

from llava15_kernels import flash_attn_with_kvcache, flash_attn_with_kvcache_ref, tuned
from llava15_kernels._dispatch import architecture, multiprocessors
from llava15_kernels.flash_decode import Plan, choose_splits
from llava15_kernels.testing import assert_close

CONFIG = {"block_n": 32, "num_warps": 2, "num_stages": 2, "waves": 1}
ENTRY = {"op": "flash_decode", "head_dim": 64, "dtype": "float16", "architecture": "sm_90", "config": CONFIG}
MEASURED = {"device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"}
KEY = (64, torch.float16, "sm_90")


@pytest.fixture(autouse=True)
def no_table(monkeypatch):
    monkeypatch.setattr(tuned, "_table", None)
    monkeypatch.delenv("LLAVA15_TUNED", raising=False)


def table(tmp_path, *entries, **changes):
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"format": 1, "measured": MEASURED, "configurations": list(entries), **changes}))
    return file


def test_without_a_table_the_rule_decides():
    assert tuned.tuned("flash_decode", KEY) is None


def test_the_environment_names_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA15_TUNED", str(table(tmp_path, ENTRY)))
    assert tuned.tuned("flash_decode", KEY) == CONFIG
    for other in ((128, torch.float16, "sm_90"), (64, torch.bfloat16, "sm_90"), (64, torch.float16, "sm_80")):
        assert tuned.tuned("flash_decode", other) is None
    assert tuned.tuned("flash_attn_varlen", KEY) is None
    tuned.use_table(None)
    assert tuned.tuned("flash_decode", KEY) is None


def test_an_override_ends(tmp_path):
    tuned.use_table(table(tmp_path, ENTRY))
    with pytest.raises(KeyError), tuned.overridden({("flash_decode", KEY): {**CONFIG, "waves": 4}}):
        assert tuned.tuned("flash_decode", KEY)["waves"] == 4
        raise KeyError
    assert tuned.tuned("flash_decode", KEY) == CONFIG


@pytest.mark.parametrize(
    "entries,changes,message",
    [
        ([{**ENTRY, "op": "flash"}], {}, "op is 'flash'"),
        ([{**ENTRY, "dtype": "float64"}], {}, "dtype is 'float64'"),
        ([{**ENTRY, "head_dim": "64"}], {}, "head_dim is '64'"),
        ([{**ENTRY, "config": {**CONFIG, "block_n": 48}}], {}, "block_n is 48"),
        ([{**ENTRY, "config": {**CONFIG, "num_warps": True}}], {}, "num_warps is True"),
        ([{**ENTRY, "config": {"block_n": 32}}], {}, "expected block_n, num_warps, num_stages, waves"),
        ([{**ENTRY, "config": {**CONFIG, "block_m": 64}}], {}, "expected block_n, num_warps, num_stages, waves"),
        ([ENTRY, ENTRY], {}, "two configurations"),
        ([], {"format": 2}, "format 1"),
        ([], {"measured": {"device": "a GPU"}}, "torch, triton, commit"),
        ([], {"measured": {**MEASURED, "dry_run": True}}, "dry run"),
    ],
)
def test_what_cannot_be_launched_is_refused(tmp_path, entries, changes, message):
    with pytest.raises(ValueError, match=message):
        tuned.use_table(table(tmp_path, *entries, **changes))


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "x").write_text("not json")
    with pytest.raises(ValueError, match="is no JSON"):
        tuned.use_table(tmp_path / "x")
    with pytest.raises(OSError):
        tuned.use_table(tmp_path / "nowhere")


@pytest.mark.parametrize("waves", [1, 4])
def test_decoding_takes_its_configuration_from_the_table(device, waves):
    q = torch.randn(1, 1, 8, 64, device=device).half()
    k, v = torch.randn(2, 1, 512, 2, 64, device=device).half()
    key = (64, torch.float16, architecture(device))
    with tuned.overridden({("flash_decode", key): {**CONFIG, "waves": waves}}):
        plan = Plan.choose(q, k, 0)
        ours = flash_attn_with_kvcache(q, k, v, backend="triton")
    rule = Plan.choose(q, k, 0)
    assert (plan.block_n, plan.num_warps, plan.num_stages) == (32, 2, 2)
    assert plan.splits == choose_splits(1, 2, 512, 32, multiprocessors(q.device), waves) != rule.splits
    full, pads = torch.tensor([512], device=device), torch.zeros(1, dtype=torch.int32, device=device)
    eager = flash_attn_with_kvcache_ref(q, k, v, full, pads, 0.125)
    assert_close(ours, eager, flash_attn_with_kvcache_ref(q.double(), k.double(), v.double(), full, pads, 0.125))
