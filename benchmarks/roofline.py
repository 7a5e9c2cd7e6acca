"""What a forward launches, moves and computes, counted on fake tensors; and the time that makes, modelled.

    python -m benchmarks.roofline --config 4b --device h100 [--json FILE]

| column           | is       | how                                                                                      |
|------------------|----------|------------------------------------------------------------------------------------------|
| launches, GB, TFLOP | counted | every operator of one real forward (`counting.py`), which is run for its shapes only     |
| floor            | modelled | what no implementation can do without, at the data sheet's rates: `floor_of`             |
| modelled         | modelled | the counted launches at the rates and overheads of `Assumptions`, best and worst         |
| measured         | measured | the median of a committed run on that device, else "not measured yet"                    |

Phases: the vision tower for one square image; a prompt of text up to its last position's logits; one more token behind a
context. Providers: transformers' eager attention, transformers' sdpa, and the patched model. Batch 1, bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .rows import output_file, results, sources, write_document

if TYPE_CHECKING:
    from .counting import Counter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"

PROVIDERS = ("eager", "sdpa", "patched")
IMAGE_SIZES = (560, 1120, 1568)
PROMPTS = (1024, 4096)
CONTEXTS = (1024, 8192)
PATCH, MERGE = 14, 2
BF16 = 2


@dataclass(frozen=True)
class Device:
    """A data sheet: memory bandwidth in bytes/s, dense bfloat16 matrix rate in operations/s."""

    name: str
    bandwidth: float
    matrix: float
    source: str
    architecture: str
    """What the kernels' configurations are chosen for; counts hardly depend on it."""


DEVICES = {
    "h100": Device("NVIDIA H100 SXM", 3.35e12, 989.4e12, "NVIDIA H100 Tensor Core GPU data sheet", "sm_90"),
    "h200": Device("NVIDIA H200 SXM", 4.8e12, 989.4e12, "NVIDIA H200 Tensor Core GPU data sheet", "sm_90"),
    "a100": Device("NVIDIA A100 80GB SXM", 2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU data sheet", "sm_80"),
    "l40s": Device("NVIDIA L40S", 0.864e12, 362.05e12, "NVIDIA L40S GPU data sheet", "sm_89"),
    "mi300x": Device("AMD Instinct MI300X", 5.3e12, 1307.4e12, "AMD Instinct MI300X accelerator data sheet", "gfx942"),
}


@dataclass(frozen=True)
class Range:
    """The best and the worst that is assumed."""

    best: float
    worst: float


@dataclass(frozen=True)
class Assumptions:
    """What turns counts into times. None of it was measured by this project.

    Attributes:
        bandwidth, matrix, attention: the share of the data sheet's rate that a large copy, a large matrix product, and an
            attention kernel reach. On an H100: 3.0 of 3.35 TB/s; 600 to 790 of 989 TFLOP/s; 300 to 415 TFLOP/s, between
            FlashAttention-2 and cuDNN in flash-attention's published chart.
        gap_us: microseconds of the device per launch besides its work. About 1.3 was seen in replayed CUDA graphs.
        operator_us: microseconds of the host per operator of torch; 21.8 ms per token of 2335 operators (Qwen's speed
            benchmark on an H20) make 9.3.
        ours_us: microseconds of the host per call of a kernel of ours: 11 to 23 times `torch.add` on a CPU, 36
            times for attention through descriptors (`results/cpu/host_time.json`), and 5 to 15 for Triton's launch.
    """

    bandwidth: Range = Range(0.90, 0.80)
    matrix: Range = Range(0.80, 0.60)
    attention: Range = Range(0.42, 0.30)
    gap_us: Range = Range(1.0, 1.6)
    operator_us: Range = Range(5.0, 10.0)
    ours_us: Range = Range(15.0, 35.0)


@dataclass(frozen=True)
class Phase:
    """One forward: `kind` is "vision" (of an image of `size` x `size` pixels), "prefill" or "decode" (of `size` tokens)."""

    kind: str
    size: int

    @property
    def name(self) -> str:
        return f"vision {self.size}x{self.size}" if self.kind == "vision" else f"{self.kind} {self.size}"

    @property
    def patches(self) -> int:
        return (self.size // PATCH) ** 2


PHASES = (
    *(Phase("vision", size) for size in IMAGE_SIZES),
    *(Phase("prefill", size) for size in PROMPTS),
    *(Phase("decode", size) for size in CONTEXTS),
)


# --- counted


def interpreted() -> None:
    """Kernels on fake CPU tensors have to believe that they can run. To be called before they are imported.

    Raises:
        RuntimeError: it is too late.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import llava15_kernels

    if not llava15_kernels.INTERPRETED:
        raise RuntimeError("the kernels were imported before TRITON_INTERPRET=1 was set; count in a process of its own")


def count(size: str, phases: tuple[Phase, ...] = PHASES, architecture: str = "sm_90") -> Iterator[tuple[Phase, str, Counter]]:
    """Every phase by every provider, of the "4b" or "8b" model."""
    import torch

    import llava15_fast
    from llava15_fast.model.modeling import VisionLayout
    from llava15_kernels._dispatch import as_if_on

    from .counting import Counter, fake_model, filled_cache

    # Where the patches are is data, which fake tensors have none of.
    layouts = {
        phase: VisionLayout.from_grids([[1, phase.size // PATCH, phase.size // PATCH]], MERGE, torch.device("cpu"))
        for phase in phases
        if phase.kind == "vision"
    }

    def forward(model: Any, phase: Phase, provider: str) -> Any:
        """The call to count. What comes before it, a filled cache, is made here."""
        if phase.kind == "vision":
            pixels = torch.empty(phase.patches, 3 * PATCH**2)
            return lambda: model.model.visual(pixels, layout=layouts[phase])
        options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        length = phase.size
        if phase.kind == "decode":
            length, options["past_key_values"] = 1, filled_cache(model, 1, phase.size, stock=provider != "patched")
        ids = torch.zeros(1, length, dtype=torch.long)
        return lambda: model(input_ids=ids, **options)

    with fake_model(size) as model:
        for provider in PROVIDERS:
            if provider == "patched":
                llava15_fast.patch(model, "triton", cuda_graph=False)
                forward(model, Phase("prefill", 2), provider)()  # lays the weights side by side, once
            else:
                model.set_attn_implementation(provider)
            for phase in phases:
                call = forward(model, phase, provider)
                with as_if_on(architecture), Counter(filled=phase.size + 1 if phase.kind == "decode" else None) as counted:
                    call()
                yield phase, provider, counted


def counted_fields(counted: Counter) -> dict[str, int]:
    """As they stand in a row."""
    return {
        "launches": counted.launches,
        "operators": sum(counted.calls.values()),
        "bytes_read": counted.read,
        "bytes_written": counted.written,
        "flops": counted.flops,
    }


# --- modelled


@dataclass(frozen=True)
class Floor:
    """Bytes and operations that no implementation can do without."""

    bytes: int
    flops: int

    def ms(self, device: Device) -> float:
        return 1e3 * max(self.bytes / device.bandwidth, self.flops / device.matrix)


def floor_of(config: Any, phase: Phase) -> Floor:
    """From the configuration alone: weights, cached keys and values and inputs once; matrix products and attention.

    Activations count as staying on the chip. `config` is a `LlavaOnevision1_5Config`.
    """
    if phase.kind == "vision":
        vision, patches = config.vision_config, phase.patches
        width, rows, merged = vision.hidden_size, patches + 1, vision.hidden_size * MERGE**2
        pixels = 3 * PATCH**2
        block = width * (4 * width + 2 * vision.intermediate_size)
        merger = merged * (merged + vision.text_hidden_size)
        attention = 4 * rows**2 * width * vision.depth
        products = patches * pixels * width + rows * vision.depth * block + patches // MERGE**2 * merger
        moved = (
            pixels * width + vision.depth * block + merger + patches * pixels + patches // MERGE**2 * vision.text_hidden_size
        )
        return Floor(BF16 * moved, 2 * products + attention)
    text = config.text_config
    heads, kv_heads, head_dim, layers = (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.head_dim,
        text.num_hidden_layers,
    )
    layer = text.hidden_size * (2 * (heads + kv_heads) * head_dim + 3 * text.intermediate_size)
    head = text.hidden_size * text.vocab_size
    tokens, context = (1, phase.size + 1) if phase.kind == "decode" else (phase.size, phase.size)
    pairs = context if phase.kind == "decode" else context * (context + 1) // 2
    cached = 2 * layers * kv_heads * head_dim * context
    return Floor(
        BF16 * (layers * layer + head + cached),
        2 * (tokens * layers * layer + head) + 4 * layers * heads * head_dim * pairs,
    )


@dataclass(frozen=True)
class Modelled:
    """Milliseconds, best and worst, and whether the "device" or the "host" is waited for in the best case."""

    best_ms: float
    worst_ms: float
    bound: str


def model_time(counted: Counter, phase: Phase, provider: str, device: Device, given: Assumptions | None = None) -> Modelled:
    """The slower of the device, launch after launch, and the host, operator after operator.

    A patched decode step is a replayed graph: its host time is left out, for the device has to work longer than the few
    operators around the graph take.
    """
    given = given or Assumptions()
    times, bound = [], "device"
    for case in ("best", "worst"):
        take = {name: getattr(value, case) for name, value in vars(given).items()}
        device_us = host_us = 0.0
        for call, times_made in counted.calls.items():
            rate = take["attention" if "attn" in call.name or "attention" in call.name else "matrix"] * device.matrix
            work = max((call.read + call.written) / (take["bandwidth"] * device.bandwidth), call.flops / rate)
            device_us += times_made * (1e6 * work + call.launches * take["gap_us"])
            host_us += times_made * take["ours_us" if call.name.startswith("llava15::") else "operator_us"]
        if provider == "patched" and phase.kind == "decode":
            host_us = 0.0
        if case == "best":
            bound = "host" if host_us > device_us else "device"
        times.append(max(device_us, host_us) / 1e3)
    return Modelled(*times, bound)


# --- measured


def measured_ms(rows: list[dict[str, Any]], config: str, phase: Phase, provider: str, device: str) -> float | None:
    """The median of the newest verified run in rows of `benchmarks.generate`; None where there is none."""
    found = None
    for row in rows:
        if row.get("kind") != "generate" or not row.get("verified") or row.get("dry_run"):
            continue
        if row["config"] != config or row["provider"] != provider or row["batch"] != 1 or not is_device(row["device"], device):
            continue
        if phase.kind == "vision":
            fits, value = row["images"] == 1 and row["image_size"] == phase.size, row.get("vision_ms")
        else:
            fits = row["images"] == 0 and row["context"] == phase.size
            value = row.get("ms_per_token" if phase.kind == "decode" else "time_to_first_token_ms")
        if fits and value:
            found = value["p50"]
    return found


def is_device(name: str, key: str) -> bool:
    """Whether a device that calls itself `name` is the one of `DEVICES[key]`."""
    return key.upper() in name.upper().replace(" ", "")


# --- the command


def table_of(
    size: str, key: str, phases: tuple[Phase, ...], rows: list[dict[str, Any]], progress: bool = False
) -> dict[str, Any]:
    """The whole result as it is written to a file."""
    import importlib.metadata

    from .counting import config_of

    device, found = DEVICES[key], []
    work = count(size, phases, device.architecture)
    if progress:
        work = track(work, f"counting {size}", total=len(phases) * len(PROVIDERS), console=Console(stderr=True), transient=True)
    with contextlib.suppress(KeyboardInterrupt):  # what is finished is shown
        for phase, provider, counted in work:
            floor = floor_of(config_of(size), phase)
            modelled = model_time(counted, phase, provider, device)
            found.append(
                {
                    "phase": phase.name,
                    "provider": provider,
                    "counted": counted_fields(counted),
                    "floor": {"bytes": floor.bytes, "flops": floor.flops, "ms": round(floor.ms(device), 3)},
                    "modelled": {
                        "best_ms": round(modelled.best_ms, 2),
                        "worst_ms": round(modelled.worst_ms, 2),
                        "bound": modelled.bound,
                    },
                    "measured_ms": measured_ms(rows, size, phase, provider, key),
                }
            )
    return {
        "config": size,
        "device": asdict(device),
        "assumptions": asdict(Assumptions()),
        "transformers": importlib.metadata.version("transformers"),
        "torch": importlib.metadata.version("torch"),
        "sources": sources(),
        "rows": found,
    }


def show(document: dict[str, Any], console: Console) -> None:
    device = document["device"]
    table = Table(
        title=f"{document['config']} on {device['name']}, bfloat16, batch 1",
        caption=f"Rates: {device['bandwidth'] / 1e12:.3g} TB/s, {device['matrix'] / 1e12:.4g} TFLOP/s ({device['source']}).",
    )
    for heading in ("phase", "provider"):
        table.add_column(heading, no_wrap=True)
    for heading in ("launches", "GB", "TFLOP"):
        table.add_column(f"{heading}\ncounted", justify="right")
    for heading in ("floor ms\nmodelled", "ms\nmodelled", "bound by\nmodelled", "ms\nmeasured"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in document["rows"]:
        if last not in (None, row["provider"]):
            table.add_section()
        last, counted, modelled = row["provider"], row["counted"], row["modelled"]
        measured = "not measured yet" if row["measured_ms"] is None else f"{row['measured_ms']:.2f}"
        table.add_row(
            row["phase"],
            row["provider"],
            str(counted["launches"]),
            f"{(counted['bytes_read'] + counted['bytes_written']) / 1e9:.2f}",
            f"{counted['flops'] / 1e12:.3f}",
            f"{row['floor']['ms']:.2f}",
            f"{modelled['best_ms']:.2f} to {modelled['worst_ms']:.2f}",
            modelled["bound"],
            measured,
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description="Counts the launches, bytes and operations of every phase of the real model on fake tensors, without a GPU "
        "and without weights, and models the time from them. Counts are labelled as counted, times as modelled; a measured "
        "time stands beside them where a run on that device has been committed.",
    )
    parser.add_argument("--config", choices=("4b", "8b"), required=True, help="The model whose shapes are counted.")
    parser.add_argument("--device", choices=tuple(DEVICES), default="h100", help="The data sheet to model with. Default: h100.")
    parser.add_argument("--phase", default="", metavar="TEXT", help="Only the phases that have this text in their name.")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="Writes the rows to this file too.")
    arguments = parser.parse_args(argv)
    phases = tuple(phase for phase in PHASES if arguments.phase in phase.name)
    if not phases:
        parser.error(f"--phase {arguments.phase!r}: there are {', '.join(phase.name for phase in PHASES)}")
    interpreted()
    document = table_of(arguments.config, arguments.device, phases, results(RESULTS), progress=True)
    show(document, Console(width=None if sys.stdout.isatty() else 128))
    if arguments.json:
        write_document(arguments.json, document)
    return 0 if len(document["rows"]) == len(phases) * len(PROVIDERS) else 130


if __name__ == "__main__":
    sys.exit(main())
