"""The roofline's counts against formulas made apart from it, and its model against arithmetic by hand."""

import json
from importlib.metadata import version

import pytest
import torch

from benchmarks import roofline
from benchmarks.counting import Call, Counter, config_of
from benchmarks.roofline import DEVICES, Assumptions, Phase, Range

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="fake CPU tensors need the interpreter's backend")


@pytest.fixture(scope="module")
def counts():
    """(phase, provider) -> counts of the 4B model, for one phase of each kind."""
    phases = Phase("vision", 560), Phase("prefill", 1024), Phase("decode", 1024)
    return {(phase.kind, provider): counted for phase, provider, counted in roofline.count("4b", phases)}


@needs_no_gpu
def test_a_patched_decode_step_by_a_closed_formula(counts):
    """Weights, keys and values, and every activation written once and read once, in bytes; six launches a layer."""
    text, counted = config_of("4b").text_config, counts["decode", "patched"]
    layers, width, mlp = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    q, kv, dim, context = 32 * 128, 8 * 128, 128, 1025
    weights = width * (q + 2 * kv) + q * width + 3 * width * mlp
    cache = 2 * kv * context
    activations = (
        (2 * width + q + 2 * kv)  # norm; q, k, v
        + (2 * q + 2 * kv + 2 * dim)  # attention: queries in and out, the new key and value written, head norms
        + (q + 2 * width)  # output projection and residual
        + (2 * width + mlp)  # norm; gate and up, activated
        + (mlp + 2 * width)  # down and residual
    )
    integers = 8 + 4 * dim // 2 + 4 + 4  # a position, frequencies, a length, a start
    ends = 2 * (2 * width) + 16 + 2 * 3 * width + 2 * (width + width * text.vocab_size + text.vocab_size)
    formula = layers * (2 * (weights + cache + activations) + integers) + ends
    # What attention's programs leave for the second launch depends on how many share a head.
    partial, rest = divmod(counted.bytes - formula, layers * 2 * 4 * (q + 32))
    assert rest == 0 and 2 <= partial <= 32, (counted.bytes, formula, partial)
    assert counted.launches == 6 * layers + 4 and sum(counted.tally.values()) == counted.launches


@needs_no_gpu
@pytest.mark.parametrize("kind", ["vision", "prefill", "decode"])
def test_operations_are_those_of_the_closed_formula(counts, kind):
    """Nothing is computed that need not be, by sdpa and by ours; eager attention computes what is masked too."""
    floor = roofline.floor_of(config_of("4b"), Phase(kind, 560 if kind == "vision" else 1024))
    # transformers 5.17 makes the text's rotary angles by a matrix product.
    angles = (0, {"vision": 0, "prefill": 2 * 64 * 1024, "decode": 2 * 64}[kind])
    masked = 4 * 36 * 32 * 128 * 1024 * 1023 // 2 if kind == "prefill" else 0
    assert counts[kind, "patched"].flops == floor.flops
    assert counts[kind, "sdpa"].flops - floor.flops in angles
    assert counts[kind, "eager"].flops - floor.flops - masked in angles
    assert floor.bytes < counts[kind, "patched"].bytes < counts[kind, "sdpa"].bytes < counts[kind, "eager"].bytes
    assert counts[kind, "patched"].launches < counts[kind, "sdpa"].launches / 2


@needs_no_gpu
def test_a_second_count_is_the_same(counts):
    again = {provider: counted for _, provider, counted in roofline.count("4b", (Phase("decode", 1024),))}
    for provider, counted in again.items():
        assert counted.calls == counts["decode", provider].calls


def test_floors_are_those_of_the_published_shapes():
    """Bytes per token as worked out by hand for the 4B and the 8B at two contexts, in GB."""
    for size, context, expected in (("4b", 1024, 8.20), ("4b", 8192, 9.25), ("8b", 1024, 15.29), ("8b", 8192, 16.34)):
        assert roofline.floor_of(config_of(size), Phase("decode", context)).bytes / 1e9 == pytest.approx(expected, abs=0.01)


def by_hand(*calls, provider="sdpa", phase=None, device="h100"):
    counted = Counter()
    for call in calls:
        counted._add(call)
    given = Assumptions(Range(1, 0.5), Range(1, 0.5), Range(0.5, 0.25), Range(1, 2), Range(5, 10), Range(20, 40))
    return roofline.model_time(counted, phase or Phase("prefill", 1), provider, DEVICES[device], given)


def test_modelled_time_by_hand():
    rate = DEVICES["h100"]
    moves = Call("aten::add", 1, int(rate.bandwidth * 50e-6), int(rate.bandwidth * 50e-6), 0)
    found = by_hand(moves)
    assert found.best_ms == pytest.approx(0.101) and found.worst_ms == pytest.approx(0.202) and found.bound == "device"
    computes = Call("aten::mm", 1, 0, 0, int(rate.matrix * 100e-6))
    assert by_hand(computes).best_ms == pytest.approx(0.101)
    attends = Call("llava15::flash_attn_varlen", 1, 0, 0, int(rate.matrix * 100e-6))
    assert by_hand(attends).worst_ms == pytest.approx(0.402)


def test_the_host_is_waited_for_where_it_is_slower_unless_a_graph_is_replayed():
    small = [Call("aten::add", 1, 0, 0, 0), Call("aten::mul", 1, 0, 0, 0), Call("llava15::rms_norm", 1, 0, 0, 0)]
    found = by_hand(*small, provider="patched")
    assert found.best_ms == pytest.approx(0.030) and found.worst_ms == pytest.approx(0.060) and found.bound == "host"
    decode = by_hand(*small, provider="patched", phase=Phase("decode", 1))
    assert decode.best_ms == pytest.approx(0.003) and decode.bound == "device"


def row(**changes):
    return {
        "kind": "generate", "config": "4b", "provider": "patched", "device": "NVIDIA H100 80GB HBM3", "batch": 1, "images": 0,
        "image_size": 0, "context": 1024, "verified": True, "dry_run": False, "ms_per_token": {"p50": 3.0},
        "time_to_first_token_ms": {"p50": 20.0}, "vision_ms": None, **changes,
    }  # fmt: skip


def test_only_a_verified_run_on_that_device_stands_beside_the_model():
    def ask(*rows, kind="decode", size=1024):
        return roofline.measured_ms(list(rows), "4b", Phase(kind, size), "patched", "h100")

    assert ask(row()) == 3.0 and ask(row(), kind="prefill") == 20.0 and ask(row(), size=8192) is None
    for changes in (
        {"verified": False}, {"dry_run": True}, {"device": "NVIDIA A100"}, {"batch": 4}, {"provider": "sdpa"}, {"config": "8b"},
        {"kind": "time"},
    ):  # fmt: skip
        assert ask(row(**changes)) is None, changes
    assert ask(row(), row(ms_per_token={"p50": 2.9})) == 2.9, "the newest"
    assert ask(row(images=1, image_size=560, vision_ms={"p50": 3.3}), kind="vision", size=560) == 3.3


@needs_no_gpu
def test_the_command_says_what_is_counted_and_what_is_modelled(tmp_path, capsys):
    file = tmp_path / "new" / "rows.json"
    status = roofline.main(["--config", "8b", "--device", "a100", "--phase", "decode 8192", "--json", str(file)])
    out = capsys.readouterr().out
    assert status == 0 and "counted" in out and "modelled" in out and "NVIDIA A100" in out
    document = json.loads(file.read_text())
    assert [row["provider"] for row in document["rows"]] == ["eager", "sdpa", "patched"]
    for found in document["rows"]:
        assert found["modelled"]["worst_ms"] > found["modelled"]["best_ms"] > found["floor"]["ms"] > 0


def test_what_was_counted_is_shown_when_stopped(tmp_path, monkeypatch, capsys):
    def stopped(*args):
        yield Phase("decode", 1024), "eager", Counter()
        raise KeyboardInterrupt

    monkeypatch.setattr(roofline, "count", stopped)
    monkeypatch.setattr(roofline, "interpreted", lambda: None)
    assert roofline.main(["--config", "4b", "--json", str(tmp_path / "rows.json")]) == 130
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 1 and "decode 1024" in capsys.readouterr().out


@needs_no_gpu
@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_committed_counts_are_those_of_this_code(size, counts):
    """Where a change moves them: python -m benchmarks.roofline --config SIZE --json benchmarks/results/roofline/SIZE.json"""
    document = json.loads((roofline.RESULTS / "roofline" / f"{size}.json").read_text())
    if document["transformers"] != version("transformers"):
        pytest.skip("counted with another release of transformers")
    committed = {(row["phase"].split()[0], row["provider"]): row["counted"] for row in reversed(document["rows"])}
    if size == "8b":
        counts = {(phase.kind, who): counted for phase, who, counted in roofline.count(size, (Phase("decode", 1024),))}
    for key, counted in counts.items():
        assert committed[key] == roofline.counted_fields(counted), key
