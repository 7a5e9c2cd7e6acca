"""`docs/benchmarks.md` and its pictures, from committed rows alone.

    python -m benchmarks.report            writes both
    python -m benchmarks.report --check    tells whether the document is what the rows make of it

| label     | from                                                                            |
|-----------|---------------------------------------------------------------------------------|
| measured  | `results/<device>/*.jsonl` of `gpu_check` and `generate`, `results/cpu/*.json`  |
| counted   | `results/roofline/*.json`                                                       |
| modelled  | the same: counts at the rates of a data sheet                                   |
| published | `published.json`: others' own words                                             |

Only rows that were verified count, and of each case those of the run that timed ours last, so that what is compared comes from
one run; rows of two devices are never compared. A dash stands where nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rows import ROOT, results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BENCHMARKS = Path("benchmarks")
PLOTS = BENCHMARKS / "results/plots"
DOCUMENT = Path("docs/benchmarks.md")
NONE = "-"

Row = dict[str, Any]
SHAPE = ("config", "images", "image_size", "batch", "context", "new_tokens")
"""What is asked, among the fields of a row of `benchmarks.generate`."""


@dataclass(frozen=True)
class Evidence:
    """Everything that was committed.

    Attributes:
        rows: of GPU runs, verified, oldest first; of each case those of one run.
        roofline: config -> document of `benchmarks.roofline`.
        cpu: document of `benchmarks.cpu_ratio`, or None.
        published: `published.json`.
    """

    rows: list[Row]
    roofline: dict[str, Row]
    cpu: Row | None
    published: Row

    @classmethod
    def load(cls, root: Path = ROOT) -> Evidence:
        folder = root / BENCHMARKS / "results"
        cpu = folder / "cpu/ratio.json"
        return cls(
            of_last_runs([row for row in results(folder) if not row.get("dry_run")]),
            {file.stem: json.loads(file.read_text()) for file in sorted((folder / "roofline").glob("*.json"))},
            verified_only(json.loads(cpu.read_text())) if cpu.is_file() else None,
            json.loads((root / BENCHMARKS / "published.json").read_text()),
        )

    def by_device(self) -> list[Evidence]:
        """One for each device that something was measured on; else this one."""
        devices = dict.fromkeys(row["device"] for row in self.rows)
        return [replace(self, rows=[row for row in self.rows if row["device"] == device]) for device in devices] or [self]

    def times(self, kernel: str, case: str | None = None) -> dict[tuple[str, str], Row]:
        """(case, provider) -> the last timing of a kernel in bfloat16."""
        return {
            (row["case"], row["provider"]): row
            for row in self.rows
            if row["kind"] == "time" and row["kernel"] == kernel and row["dtype"] == "bfloat16" and case in (None, row["case"])
        }

    def answers(self, **wanted: Any) -> dict[str, Row]:
        """provider -> the last answer with these figures, of batch 1 and text alone unless `wanted` says otherwise."""
        wanted = {"batch": 1, "images": 0, **wanted}
        return {
            row["provider"]: row
            for row in self.rows
            if row["kind"] == "generate" and all(row[name] == value for name, value in wanted.items())
        }

    def counted(self, config: str, phase: str) -> dict[str, Row]:
        """provider -> the roofline's row."""
        document = self.roofline.get(config, {"rows": []})
        return {row["provider"]: row for row in document["rows"] if row["phase"] == phase}


def verified_only(document: Row) -> Row:
    return {**document, "rows": [row for row in document["rows"] if row["verified"]]}


CASE = ("device", "kind", "dtype", "kernel", "case", *SHAPE)
"""What rows that are compared have in common."""


def of_last_runs(rows: list[Row]) -> list[Row]:
    """The verified rows, of each case those of the run that tried ours last: if it was wrong then, no time of it stands."""

    def case(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in CASE)

    rows = sorted(rows, key=lambda row: row["started"])
    last = {case(row): row["started"] for row in rows if row.get("provider") in ("ours", "patched")}
    return [row for row in rows if row.get("verified") and row["started"] == last.get(case(row), row["started"])]


# --- tables


def table(*rows: tuple[str, ...]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def median(row: Row | None, figure: str, unit: str) -> str:
    """A measured quantile with its device, or that there is none."""
    if row is None or not row.get(figure):
        return NONE
    return f"{row[figure]['p50']:.2f} {unit} ({short_device(row['device'])})"


def everywhere(evidence: Evidence, cell: Callable[[Evidence], str]) -> str:
    """A cell with what each device has to say."""
    said = [text for text in map(cell, evidence.by_device()) if text != NONE]
    return ", ".join(said) or NONE


def short_device(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "H100"."""
    found = re.search(r"\b(H100|H200|A100|L40S|MI300X|B200|A10G?|L4|T4)\b", name)
    return found[1] if found else name


DECODE = [(config, context) for config in ("4b", "8b") for context in (1024, 8192)]


def decode_table(evidence: Evidence) -> str:
    rows = [("", "lower bound", "patched, modelled", "patched, measured", "sdpa, modelled", "sdpa, measured")]
    for config, context in DECODE:
        counted = evidence.counted(config, f"decode {context}")

        def measured(provider: str, config: str = config, context: int = context) -> str:
            def cell(one: Evidence) -> str:
                return median(one.answers(config=config, context=context).get(provider), "ms_per_token", "ms")

            return everywhere(evidence, cell)

        modelled = {
            provider: f"{row['modelled']['best_ms']:.1f} to {row['modelled']['worst_ms']:.1f} ms"
            for provider, row in counted.items()
        }
        rows.append(
            (
                f"{config.upper()}, context {context}",
                f"{counted['patched']['floor']['ms']:.2f} ms",
                *(text for provider in ("patched", "sdpa") for text in (modelled[provider], measured(provider))),
            )
        )
    return table(*rows)


PHASES = (
    ("vision 1120x1120", "an image of 1120 x 1120"),
    ("prefill 1024", "prefill of 1024 tokens"),
    ("decode 1024", "decode step at context 1024"),
)


def counts_table(evidence: Evidence) -> str:
    rows = [("per forward", "launches: eager", "sdpa", "patched", "GB moved: eager", "sdpa", "patched", "TFLOP")]
    for config in ("4b", "8b"):
        for phase, title in PHASES:
            found = evidence.counted(config, phase)
            counted = [found[provider]["counted"] for provider in ("eager", "sdpa", "patched")]
            rows.append(
                (
                    f"{config.upper()}, {title}",
                    *(str(count["launches"]) for count in counted),
                    *(f"{(count['bytes_read'] + count['bytes_written']) / 1e9:.1f}" for count in counted),
                    f"{counted[-1]['flops'] / 1e12:.3g}",
                )
            )
    return table(*rows)


def first_call(row: Row) -> str:
    """In a process that has to compile, and in one that finds compiled kernels."""
    if "first_call_s" not in row:
        return "-"
    warm = f", {row['first_call_warm_s']:.1f} s with compiled kernels" if "first_call_warm_s" in row else ""
    return f"{row['first_call_s']:.1f} s{warm}"


def latency_table(evidence: Evidence) -> str:
    """Every shape and decoding back end that was measured."""
    title = "## Latency by context, batch, image size and decoding back end, measured"
    rows = [("", "", "preprocessing", "TTFT", "TPOT", "end-to-end latency", "tokens/s", "memory", "first call")]
    figures = ("preprocessing_ms", "time_to_first_token_ms", "ms_per_token", "generate_ms")
    for one in evidence.by_device():
        found = {(*(row[name] for name in SHAPE), row["provider"]): row for row in one.rows if row["kind"] == "generate"}
        for (config, images, size, batch, context, new_tokens, provider), row in sorted(found.items()):
            pictures = f"{images} x {size} x {size} + " if images else ""
            what = f"{config.upper()}, batch {batch}, {pictures}{context} + {new_tokens} tokens ({short_device(row['device'])})"
            times = (f"{row[figure]['p50']:.2f} ms" if figure in row else NONE for figure in figures)
            rate = f"{1e3 * batch / row['ms_per_token']['p50']:.0f}"
            rows.append((what, provider, *times, rate, f"{row['peak_gb']} GB", first_call(row)))
    return f"{title}\n\n{table(*rows)}" if len(rows) > 1 else ""


def runs_line(evidence: Evidence) -> str:
    """What the measured rows were measured with."""
    what = ("driver", "torch", "triton", "transformers", "commit")
    runs = dict.fromkeys((row["device"], *(row.get(name) for name in what)) for row in evidence.rows)
    said = [
        f"{device} ({', '.join(f'{name} {value[:12]}' for name, value in zip(what, values, strict=True) if value)})"
        for device, *values in runs
    ]
    return f"Measured on: {'; '.join(said) or 'no GPU yet'}."


def published_table(evidence: Evidence) -> str:
    rows = [("", "measured here", "published there", "by", "source")]
    for figure in evidence.published["figures"]:
        rows.append(
            (
                figure["what"],
                everywhere(evidence, lambda one, wanted=figure["ours"]: ours_beside(one, wanted)),
                figure["value"],
                f"{figure['by']}, {figure['on']}",
                f"[{figure['source']}]({figure['url']})",
            )
        )
    return table(*rows)


def ours_beside(evidence: Evidence, wanted: Row) -> str:
    if "kernel" in wanted:
        row = evidence.times(**wanted).get((wanted["case"], "ours"))
        return NONE if row is None else f"{row['rate']:.0f} {row['unit']} ({short_device(row['device'])})"
    figure = wanted["figure"]
    return median(evidence.answers(config=wanted["config"], context=wanted["context"]).get("patched"), figure, "ms")


def memory_bound(evidence: Evidence) -> dict[str, dict[str, float]]:
    """Kernel, case and device -> provider -> percent of a copy of as many bytes in the same run."""
    found: dict[str, dict[str, float]] = {}
    for one in evidence.by_device():
        kernels = {row["kernel"]: None for row in one.rows if row["kind"] == "time" and row["provider"] == "copy"}
        for kernel in kernels:
            timings = one.times(kernel)
            for (case, provider), row in timings.items():
                copy = timings.get((case, "copy"))
                if copy and provider != "copy" and row["bytes"] > 2e7:
                    title = f"{kernel} {case} ({short_device(row['device'])})"
                    found.setdefault(title, {})[provider] = 100 * copy["p50_us"] / row["p50_us"]
    return {title: by for title, by in found.items() if "ours" in by}


def memory_table(evidence: Evidence) -> str:
    found = memory_bound(evidence)
    if not found:
        return ""
    rows = [("percent of a copy of as many bytes, measured", "ours", "best of the others")]
    for title, by in found.items():
        others = {provider: percent for provider, percent in by.items() if provider != "ours"}
        best = max(others, key=others.get, default=None)
        rows.append((title, f"{by['ours']:.0f}%", f"{others[best]:.0f}% ({best})" if best else "-"))
    return table(*rows)


def cpu_table(evidence: Evidence) -> str:
    if evidence.cpu is None:
        return ""
    cases: dict[str, dict[tuple[str, str], Row]] = {}
    for row in evidence.cpu["rows"]:
        cases.setdefault(row["case"], {})[row["size"], row["unpatched"]] = row
    columns = list(dict.fromkeys((row["size"], row["unpatched"]) for row in evidence.cpu["rows"]))
    rows = [("time patched / unpatched (quartiles), measured", *(f"{size} model, {attention}" for size, attention in columns))]
    for case, found in cases.items():
        measured = [found.get(column) for column in columns]
        texts = ("{:.2f} ({:.2f} to {:.2f})".format(row["median"], *row["quartiles"]) if row else "-" for row in measured)
        rows.append((case, *texts))
    return table(*rows)


def page(evidence: Evidence) -> str:
    """The document."""
    device = next(iter(evidence.roofline.values()))["device"]
    assumed = next(iter(evidence.roofline.values()))["assumptions"]

    def share(name: str) -> str:
        return f"{100 * assumed[name]['best']:.0f} to {100 * assumed[name]['worst']:.0f}%"

    def reach(name: str) -> str:
        return f"{assumed[name]['best']:g} to {assumed[name]['worst']:g}"

    def picture(name: str, words: str) -> list[str]:
        return [f"![{words}](../{(PLOTS / name).as_posix()}.png)"] if PICTURES[name][1](evidence) else []

    threads = f", float32, threads: {evidence.cpu['threads']}" if evidence.cpu else ""
    blocks = [
        "# Benchmarks",
        "Each number is *measured* (a committed, verified run on the device that is named), *counted* (operators of a forward "
        "of the real model on fake tensors), *modelled* (counts at the rates of a data sheet) or *published* (by others). This "
        "page is written by `python -m benchmarks.report`, and a test compares it with the committed rows.",
        runs_line(evidence),
        "## Decode: time per output token (TPOT), batch 1, bfloat16",
        decode_table(evidence),
        *picture("decode", "Milliseconds per token: bandwidth lower bound, modelled, measured, published"),
        f"Bandwidth lower bound: weights and KV cache read once, at {device['bandwidth'] / 1e12:.2f} TB/s ({device['name']}). "
        f"Modelled: {share('bandwidth')} of that, {reach('gap_us')} us of device time per launch, {reach('operator_us')} us of "
        "host time per operator without a CUDA graph; `python -m benchmarks.roofline` prints every phase, for five "
        "devices.",
        latency_table(evidence),
        "## Kernel launches and memory traffic, counted",
        counts_table(evidence),
        *picture("launches", "Counted kernel launches per forward: eager, sdpa, patched"),
        "## Published results",
        published_table(evidence),
        *picture("attention", "Attention in TFLOP/s by length, measured and published"),
        memory_table(evidence),
        "## Without a GPU: torch backend relative to the unpatched model, random weights" + threads,
        cpu_table(evidence),
        "Dense masks: sdpa, and in the vision tower one call over all images behind a mask, as in the published code; our "
        "unpatched model has none.",
        "To repeat: `PYTHONPATH=kernels python -m benchmarks.gpu_check --out DIR` (under 9 minutes, one GPU), `python -m "
        "benchmarks.generate --config 8b`, `python -m benchmarks.roofline --config 8b`, `python -m benchmarks.cpu_ratio`, and "
        "`python -m pytest benchmarks` for the kernels one by one. Predictions and what came of them: "
        "[benchmarks/NOTES.md](../benchmarks/NOTES.md).",
    ]  # fmt: skip
    return "\n\n".join(filter(None, blocks)) + "\n"


# --- pictures

OURS, FLOOR, PUBLISHED = "#c2410c", "#111827", "#cbd5e1"
OTHERS = ("#64748b", "#94a3b8", "#0f766e", "#7c3aed", "#0369a1", "#a16207")
CHARTED = {"FlashAttention-2": "#64748b", "Triton": "#b45309", "cuDNN": "#0f766e", "FlashAttention-3": "#7c3aed"}
BESIDE = {
    "SDPA flash": "#64748b", "SDPA cuDNN": "#0f766e", "torch varlen_attn": "#0369a1", "FlexAttention": "#be185d",
    "flash-attn": "#111827",
}  # fmt: skip
"""Attention: who is in the published chart, and whose measurements are drawn beside ours."""
WIDTH = 8.0
"""Inches, at 150 dots each: as wide as a document shows it."""


def new_figure(height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6, "figure.dpi": 150}
    )
    return pyplot.subplots(1, columns, figsize=(WIDTH, height), layout="constrained", **options)


def launches_picture(evidence: Evidence) -> Figure:
    figure, axes = new_figure(3.2)
    colors = {"eager": OTHERS[1], "sdpa": OTHERS[0], "patched": OURS}
    for group, (phase, _) in enumerate(PHASES):
        found = evidence.counted("4b", phase)
        for index, (provider, color) in enumerate(colors.items()):
            y, value = 4 * group + index, found[provider]["counted"]["launches"]
            axes.barh(y, value, 0.85, color=color, label=provider if group == 0 else None)
            axes.text(value + 15, y, f"{value}", va="center", fontsize=9, fontweight="bold" if provider == "patched" else None)
    axes.set_yticks([4 * group + 1 for group in range(len(PHASES))], [title for _, title in PHASES])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("kernel launches per forward of the 4B, counted")
    axes.legend(frameon=False, loc="upper right")
    return figure


def decode_picture(evidence: Evidence) -> Figure:
    configs = ("4b", "8b")
    figure, both = new_figure(3.4, len(configs))
    for axes, config in zip(both, configs, strict=True):
        _decode_bars(axes, evidence, config)
    longest = max(bar.get_x() + bar.get_width() for axes in both for bar in axes.patches)
    for axes in both:
        axes.set_xlim(0, 1.32 * longest)  # room for the words behind the bars
    figure.supxlabel("TPOT in ms at context length 1024 (published: a short context), batch 1, bfloat16", fontsize=10)
    return figure


def _decode_bars(axes: Axes, evidence: Evidence, config: str) -> None:
    counted, devices = evidence.counted(config, "decode 1024"), evidence.by_device()
    device = short_device(evidence.roofline[config]["device"]["name"])
    labels = []

    def bar(label: str, low: float, high: float, text: str, **style: Any) -> None:
        y = len(labels)
        labels.append(label)
        axes.barh(y, high - low, 0.7, left=low, zorder=2, **style)
        axes.text(max(high, floor) + 0.4, y, text, va="center", fontsize=9)

    floor = counted["patched"]["floor"]["ms"]
    bar(f"lower bound, {device}", 0, floor, f"{floor:.2f}", color=FLOOR)
    for provider, color in (("patched", OURS), ("sdpa", OTHERS[0])):
        low, high = (counted[provider]["modelled"][f"{case}_ms"] for case in ("best", "worst"))
        bar(
            f"{provider},\nmodelled, {device}", low, high, f"{low:.1f} to {high:.1f}",
            facecolor="white", edgecolor=color, hatch="////",
        )  # fmt: skip
        measured = [one.answers(config=config, context=1024).get(provider) for one in devices]
        for row in filter(None, measured):
            value = row["ms_per_token"]["p50"]
            bar(f"{provider},\nmeasured, {short_device(row['device'])}", 0, value, f"{value:.2f}", color=color)
    for entry in evidence.published["figures"]:
        if entry["ours"].get("config") == config and entry["ours"]["context"] == 1024:
            on = entry["on"].split(",")[0]
            bar(f"{entry['by']},\npublished, {on}", 0, entry["number"], f"{entry['number']:g}", color=PUBLISHED)
    axes.axvline(floor, color=FLOOR, linewidth=0.8, linestyle=":", zorder=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_title(config.upper(), loc="left", fontsize=11, fontweight="bold")


def charted(evidence: Evidence) -> tuple[Evidence, str]:
    """What the device of the published chart has measured, else another's, and its name."""
    named = [(one, short_device(one.rows[0]["device"])) for one in evidence.by_device() if one.times("flash_attn_varlen_func")]
    return next((pair for pair in named if pair[1] == "H100"), named[0])


def attention_picture(evidence: Evidence) -> Figure:
    published = evidence.published["attention"]
    one, device = charted(evidence)
    figure, both = new_figure(3.8, 2, sharey=True)
    for axes, kind in zip(both, ("vision", "causal"), strict=True):
        for name, color in CHARTED.items():
            values = published[kind][name]
            axes.plot(published["tokens"], values, color=color, linewidth=1.2, linestyle="--", label=f"{name}, published")
        points: dict[str, list[tuple[int, float]]] = {}
        for (case, provider), row in one.times("flash_attn_varlen_func").items():
            if (match := re.fullmatch(rf"{kind} (\d+)", case)) and "rate" in row:
                points.setdefault(provider, []).append((int(match[1]), row["rate"]))
        for provider, color in {**BESIDE, "ours": OURS}.items():
            if found := sorted(points.get(provider, [])):
                width = 2.4 if provider == "ours" else 1.4
                axes.plot(
                    *zip(*found, strict=True),
                    marker="o",
                    markersize=4,
                    color=color,
                    linewidth=width,
                    label=f"{provider}, measured",
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(published["tokens"], ["1k", "2k", "4k", "8k", "16k"])
        axes.minorticks_off()
        axes.set_title(published[kind]["title"], loc="left", fontsize=11)
        axes.set_xlabel("tokens of a segment")
    both[0].set_ylim(0)
    both[0].set_ylabel(f"TFLOP/s, forward, bfloat16\nmeasured on {device}")
    handles = {label: handle for axes in both for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


PICTURES = {
    "decode": (decode_picture, lambda evidence: {"4b", "8b"} <= evidence.roofline.keys()),
    "launches": (launches_picture, lambda evidence: "4b" in evidence.roofline),
    "attention": (
        attention_picture,
        lambda evidence: any("rate" in row for row in evidence.times("flash_attn_varlen_func").values()),
    ),
}
"""name -> what draws it, and whether there is anything to draw."""


def draw_all(evidence: Evidence, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (draw, has_data) in PICTURES.items():
        if has_data(evidence):
            files.append(folder / f"{name}.png")
            draw(evidence).savefig(files[-1], facecolor="white")
    return files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Draws the pictures and writes docs/benchmarks.md, from the rows that are committed under "
        "benchmarks/results. Drawing needs matplotlib (pip install '.[benchmarks]').",
    )
    parser.add_argument("--check", action="store_true", help="Writes nothing; the exit status is 1 if the document differs.")
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="DIR", help="The checkout to read and write. Default: this one."
    )
    arguments = parser.parse_args(argv)
    document = arguments.root / DOCUMENT
    if not (document.is_file() and (arguments.root / BENCHMARKS / "published.json").is_file()):
        parser.error(f"--root {arguments.root}: not a checkout of this project")
    evidence = Evidence.load(arguments.root)
    before, after = document.read_text(), page(evidence)
    if arguments.check:
        print(f"{DOCUMENT} is up to date" if before == after else f"{DOCUMENT} differs: run python -m benchmarks.report")
        return int(before != after)
    try:
        files = draw_all(evidence, arguments.root / PLOTS)
    except ModuleNotFoundError as error:
        print(f"no pictures without {error.name}: pip install '.[benchmarks]'", file=sys.stderr)
        return 2
    document.write_text(after)
    print("\n".join(str(file) for file in [document, *files]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
