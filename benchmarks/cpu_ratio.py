"""patched / unpatched on a CPU: what the torch backend costs or gains, for people without a GPU.

    python -m benchmarks.cpu_ratio --json benchmarks/results/cpu/ratio.json

Random weights, two sizes; unpatched with transformers' sdpa attention, its default, and with its eager attention; where several
images share a call, also with the vision attention of the published code (`dense_attention`). Each figure is the median over
interleaved pairs (one run of each, in turns); both sides are checked to give the same result first, and what does not is a row
without a ratio and exit status 1. Only the ratios mean something: the machine's speed does not.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import llava15_fast
from llava15_fast import LlavaOnevision1_5Config, LlavaOnevision1_5ForConditionalGeneration
from llava15_fast.model.modeling import LlavaOnevision1_5VisionAttention, VisionLayout
from llava15_kernels.vision_rope import apply_rope_tables

from .rows import environment, output_file, positive, write_document

SIZES = {
    "small": {"text": (256, 768, 8, 2, 32, 4), "vision": (192, 768, 4, 4)},
    "large": {"text": (768, 2048, 12, 4, 64, 6), "vision": (384, 1536, 6, 6)},
}
"""(width, MLP width, heads, KV heads, head_dim, layers) and (width, MLP width, heads, layers)."""

DENSE = "dense masks"
ATTENTIONS = ("sdpa", "eager", DENSE)
"""The attention in the unpatched model: transformers', or `dense_attention`."""


def random_model(size: str) -> LlavaOnevision1_5ForConditionalGeneration:
    width, mlp, heads, kv_heads, head_dim, layers = SIZES[size]["text"]
    vision_width, vision_mlp, vision_heads, depth = SIZES[size]["vision"]
    text = {
        "hidden_size": width, "intermediate_size": mlp, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "num_hidden_layers": layers, "vocab_size": 2048, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {
        "hidden_size": vision_width, "intermediate_size": vision_mlp, "num_heads": vision_heads, "depth": depth,
        "text_hidden_size": width,
    }  # fmt: skip
    config = LlavaOnevision1_5Config(
        text_config=text, vision_config=vision, image_token_id=2000, video_token_id=2001, vision_start_token_id=2002
    )
    torch.manual_seed(0)
    model = LlavaOnevision1_5ForConditionalGeneration(config).eval()
    for module in model.modules():
        # As large as a trained model's: the default is so small that an error in the MLP would not be seen.
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def dense_attention(
    attention: LlavaOnevision1_5VisionAttention,
    hidden_states: torch.Tensor,
    layout: VisionLayout,
    cos: torch.Tensor,
    sin: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What the published code computes for several images: every row with every row, behind a mask made anew in each layer."""
    rows = attention.qkv(hidden_states).view(-1, 3, attention.num_heads, attention.head_dim)
    query, key, value = rows.unbind(1)
    query, key = apply_rope_tables(query, key, cos, sin)
    lengths = torch.tensor(layout.lengths)
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    attended = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)),
        attn_mask=segment[:, None] == segment,
        scale=attention.scaling,
    )
    return attention.proj(attended[0].transpose(0, 1).reshape(hidden_states.shape)), None


def unpatched_model(size: str, attention: str) -> LlavaOnevision1_5ForConditionalGeneration:
    model = random_model(size)
    model.set_attn_implementation("sdpa" if attention == DENSE else attention)
    if attention == DENSE:
        for block in model.model.visual.blocks:
            block.attn.forward = functools.partial(dense_attention, block.attn)
    return model


def cases() -> dict[str, Callable[[Any], torch.Tensor]]:
    """name -> a call on a model."""
    torch.manual_seed(1)
    prompt = torch.randint(0, 1999, (1, 384))
    batch = torch.randint(0, 1999, (4, 256))
    mask = torch.ones_like(batch)
    for row, pads in enumerate((0, 200, 120, 160)):
        mask[row, :pads] = 0
    many, seen = batch.reshape(16, 64), torch.arange(64) >= 3 * torch.arange(16)[:, None]
    grids = {
        "": torch.tensor([[1, 32, 32]]),
        ", 4 images": torch.tensor([[1, 24, 24]] * 4),
        ", 12 images": torch.tensor([[1, 8, 8]] * 12),
    }

    def pixels(grid_thw: torch.Tensor) -> torch.Tensor:
        return torch.randn(int(grid_thw.prod(-1).sum()), 588, generator=torch.Generator().manual_seed(2))

    def vision(grid_thw: torch.Tensor) -> Callable[[Any], torch.Tensor]:
        patches = pixels(grid_thw)
        return lambda model: model.model.visual(patches, grid_thw=grid_thw).pooler_output

    def prompt_with(grid_thw: torch.Tensor) -> Callable[[Any], torch.Tensor]:
        patches = pixels(grid_thw)
        ids = torch.cat([torch.full((1, len(patches) // 4), 2000), prompt[:, :32]], dim=1)
        inputs = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid_thw, "logits_to_keep": 1}
        return lambda model: model(**inputs).logits

    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return {
        "prefill": lambda model: model(input_ids=prompt, logits_to_keep=1).logits,
        "prefill, padded batch": lambda model: model(input_ids=batch, attention_mask=mask, logits_to_keep=1).logits,
        "decode": lambda model: model.generate(prompt[:, :32], max_new_tokens=24, **greedy),
        "decode, padded batch": lambda model: model.generate(many, attention_mask=seen.long(), max_new_tokens=24, **greedy),
        **{f"vision{images}": vision(grid_thw) for images, grid_thw in grids.items()},
        **{f"prompt{images}": prompt_with(grid_thw) for images, grid_thw in grids.items() if images},
    }


@torch.inference_mode()
def ratio(call: Callable[[Any], torch.Tensor], unpatched: Any, patched: Any, pairs: int) -> dict[str, Any]:
    """Quantiles of patched / unpatched over interleaved pairs.

    Raises:
        AssertionError: the two do not give the same.
    """
    expected = call(unpatched)
    bound = 1e-5 * float(expected.abs().max()) if expected.is_floating_point() else 0
    torch.testing.assert_close(call(patched), expected, rtol=0, atol=bound)
    ratios = []
    for index in range(pairs):
        # Whoever comes second finds a warmer cache: in turns.
        order = (unpatched, patched) if index % 2 else (patched, unpatched)
        taken = {}
        for model in order:
            start = time.perf_counter()
            call(model)
            taken[id(model)] = time.perf_counter() - start
        ratios.append(taken[id(patched)] / taken[id(unpatched)])
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"median": round(statistics.median(ratios), 3), "quartiles": [round(low, 3), round(high, 3)]}


def measured(size: str, name: str, attention: str, models: dict[str, Any], pairs: int) -> dict[str, Any]:
    """The row of one case, against the unpatched model with this `attention`."""
    about = {"case": name, "size": size, "unpatched": attention, "dtype": "float32", "pairs": pairs}
    try:
        return {**about, "verified": True, **ratio(cases()[name], models[attention], models["patched"], pairs)}
    except AssertionError as error:
        return {**about, "verified": False, "error": " ".join(str(error).split())[:300]}


def main(argv: list[str] | None = None) -> int:
    """Status 0: all was verified; 1: something is wrong; 130: stopped by hand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_ratio",
        description="Times patched against unpatched models on a CPU, as ratios. What does not give the same is not timed.",
    )
    parser.add_argument("--pairs", type=positive, default=15, metavar="N", help="Interleaved pairs per figure. By default 15.")
    parser.add_argument("--select", default="", metavar="TEXT", help="Only the cases that have this text in their name.")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="Writes the rows to this file, anew after each of them."
    )
    arguments = parser.parse_args(argv)
    work = [
        (size, name, attention)
        for size in SIZES
        for name in cases()
        for attention in ATTENTIONS
        if arguments.select in name and (attention != DENSE or "images" in name)
    ]
    if arguments.pairs < 2:
        parser.error("--pairs has to be at least 2, for quartiles")
    if not work:
        parser.error(f"--select {arguments.select!r}: no case has this in its name; there are {', '.join(cases())}")
    document: dict[str, Any] = {
        "unit": "patched / unpatched time", **environment(), "threads": torch.get_num_threads(), "rows": [],
    }  # fmt: skip
    models: dict[str, dict[str, Any]] = {}
    try:
        for size, name, attention in track(work, "timing", console=Console(stderr=True), transient=True):
            if size not in models:
                models = {size: {name: unpatched_model(size, name) for name in ATTENTIONS}}
                models[size]["patched"] = random_model(size)
                llava15_fast.patch(models[size]["patched"], "torch")
            row = measured(size, name, attention, models[size], arguments.pairs)
            document["rows"].append(row)
            said = f"{row['median']:.3f}  quartiles {row['quartiles']}" if row["verified"] else f"WRONG: {row['error']}"
            print(f"{size:6} {name:24} patched / {attention:11} {said}", flush=True)
            if arguments.json:
                write_document(arguments.json, document)
    except KeyboardInterrupt:
        print(f"stopped by hand after {len(document['rows'])} of {len(work)} rows", file=sys.stderr)
        return 130
    return 0 if all(row["verified"] for row in document["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
