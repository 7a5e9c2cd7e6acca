"""Whole answers, end to end: what a user waits for, against what they would use instead.

    python -m benchmarks.generate --config 4b|8b|tiny|DIR [--image-size 1120] [--images 1] [--batch 1] [--context 64]

Random weights at the real shapes, random images and prompts; nothing is downloaded. A prompt is its images' placeholders and
`--context` tokens of text. Greedy search with an end token that never comes, so that every provider tests for the end.

| figure                    | from                                                                                       |
|---------------------------|--------------------------------------------------------------------------------------------|
| `preprocessing_ms`        | the Pillow image processor, on the CPU, for all images of the batch                        |
| `vision_ms`               | the vision tower alone                                                                     |
| `time_to_first_token_ms`  | `generate` of one token: vision, prompt, first token                                       |
| `generate_ms`             | `generate` of all tokens                                                                   |
| `ms_per_token`            | (the last - the one before) / (tokens - 1)                                                 |
| `first_call_s`            | with `--first-calls`, before anything else asks the provider: the `generate` of a process  |
|                           | with no kernel compiled (`kernels_compiled` of ours); of the compiled provider, at its     |
|                           | first shape                                                                                |
| `first_call_warm_s`       | the same of ours in a process that finds its kernels in the cache                          |
| `peak_gb`                 | the most memory that torch held during `generate`, weights included                        |

A row of a patched model says what `ran` in each part, by backend; where fallback instead, it is wrong and has no times.
Rows of a CPU are marked as `dry_run`: its times say nothing about a GPU.

Before a provider is timed it is verified on the timed prompts: logits of the last prompt token and of `FORCED` given tokens
after it, from the same `generate` (through the graph, where there is one), against the same weights in float32, by the error
rule of `llava15_kernels.testing` with transformers' sdpa as what may be expected of the dtype. In float32 the token ids have to
be those of sdpa too. What fails is a row without times, and exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import StaticCache
from transformers.initialization import no_init_weights
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from triton.runtime.jit import JITFunction

import llava15_fast
from llava15_fast import LlavaOnevision1_5Config, LlavaOnevision1_5ForConditionalGeneration
from llava15_fast.model.releases import CACHE
from llava15_fast.tools.verify import exact_float32
from llava15_kernels._dispatch import Backend
from llava15_kernels.testing import assert_close, worst

from .counting import config_of
from .rows import Rows, environment, output_folder, positive
from .sizes import TEXT
from .timing import Timing

SEED = 20260923
FORCED = 6
"""A decode step is captured when it comes for the second time and replayed from then on."""
VERIFIED_PATCHES, VERIFIED_TOKENS = 30_000, 20_000
"""Of a batch that is verified as a whole, for float32 needs room. Beyond, only its first prompts are."""


@dataclass(frozen=True)
class Shape:
    """What is asked: `batch` prompts, each of `images` square images and `context` tokens of text, `new_tokens` answered."""

    image_size: int = 1120
    images: int = 1
    batch: int = 1
    context: int = 64
    new_tokens: int = 256

    def __str__(self) -> str:
        images = f"{self.images} x {self.image_size}x{self.image_size} + " if self.images else ""
        return f"batch {self.batch}, {images}{self.context} + {self.new_tokens} tokens"


# --- the model


def tiny_config() -> LlavaOnevision1_5Config:
    text = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "depth": 2, "text_hidden_size": 128}
    ids = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
    return LlavaOnevision1_5Config(text_config=text, vision_config=vision, **ids)


def configuration(name: str) -> LlavaOnevision1_5Config:
    if name == "tiny":
        return tiny_config()
    return config_of(name) if name in TEXT else LlavaOnevision1_5Config.from_pretrained(name)


def side_of(config: LlavaOnevision1_5Config) -> int:
    """Pixels that become one token, on a side."""
    return config.vision_config.patch_size * config.vision_config.spatial_merge_size


def end_token(config: LlavaOnevision1_5Config) -> int:
    return config.text_config.vocab_size - 1


@torch.no_grad()
def build(name: str, device: torch.device, dtype: torch.dtype) -> LlavaOnevision1_5ForConditionalGeneration:
    """The model "4b", "8b" or "tiny" with random weights, made on the device; or the checkpoint of a folder."""
    if name not in (*TEXT, "tiny"):
        return LlavaOnevision1_5ForConditionalGeneration.from_pretrained(name, dtype=dtype).eval().to(device)
    config = configuration(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = LlavaOnevision1_5ForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(SEED)
    for path, parameter in model.named_parameters():
        scale = parameter.ndim < 2 and path.endswith("weight")
        parameter.normal_(1.0 if scale else 0.0, 0.1 if scale else 0.02)
    # Its logit is 0, which is never the largest of so many.
    model.lm_head.weight[end_token(config)] = 0.0
    return model


@contextlib.contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """The same weights, widened in place and narrowed again, which gives back every bit."""
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
    try:
        for parameter in dtypes:
            parameter.data = parameter.data.float()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the narrow weights' pieces are of no use to wide activations
        with exact_float32():
            yield
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)


# --- the prompts


@dataclass(frozen=True)
class Prompts:
    """Inputs of `generate` on the device, and the images they were made of."""

    inputs: dict[str, torch.Tensor]
    images: list[np.ndarray]
    patches: int

    @classmethod
    def make(cls, config: LlavaOnevision1_5Config, shape: Shape, device: torch.device) -> Prompts:
        random, side = np.random.default_rng(SEED), side_of(config)
        if shape.images and shape.image_size % side:
            raise ValueError(f"image size {shape.image_size}: expected a multiple of {side}, so that nothing is resized")
        size = (shape.image_size, shape.image_size, 3)
        images = [random.integers(0, 256, size, dtype=np.uint8) for _ in range(shape.batch * shape.images)]
        placeholders = [config.image_token_id] * (shape.image_size // side) ** 2
        image = [config.vision_start_token_id, *placeholders, config.vision_end_token_id]
        words = min(config.image_token_id, config.text_config.vocab_size) - 16
        rows = [[*image * shape.images, *random.integers(8, words, shape.context).tolist()] for _ in range(shape.batch)]
        ids = torch.tensor(rows, device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            inputs |= {name: value.to(device) for name, value in preprocess(config, images).items()}
        patches = int(inputs["image_grid_thw"].prod(-1).sum()) if images else 0
        return cls(inputs, images, patches)

    def first(self, prompts: int, images: int) -> dict[str, torch.Tensor]:
        """The inputs of the first `prompts` prompts of `images` images each."""
        inputs = {name: self.inputs[name][:prompts] for name in ("input_ids", "attention_mask")}
        if self.images:
            grids = self.inputs["image_grid_thw"][: prompts * images]
            inputs["image_grid_thw"] = grids
            inputs["pixel_values"] = self.inputs["pixel_values"][: int(grids.prod(-1).sum())]
        return inputs


def preprocess(config: LlavaOnevision1_5Config, images: list[np.ndarray]) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    pixels = max(image.shape[0] * image.shape[1] for image in images)
    processor = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size, merge_size=vision.spatial_merge_size, temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": 1, "longest_edge": pixels},
    )  # fmt: skip
    return dict(processor(images, return_tensors="pt"))


# --- who answers


@dataclass(frozen=True)
class Answerer:
    """A model set up to answer.

    Attributes:
        options: ids of a prompt -> what `generate` is given for this provider, each time anew.
        ran: what is to be said of its calls in a row; raises AssertionError where something else ran in its place.
    """

    model: Any
    options: Callable[[torch.Tensor], dict[str, Any]] = lambda ids: {}
    ran: Callable[[], dict[str, Any]] = dict

    def generate(self, inputs: dict[str, torch.Tensor], tokens: int, **options: Any) -> Any:
        """Greedy, to `tokens` new ones."""
        end, given = end_token(self.model.config), self.options(inputs["input_ids"])
        greedy = {"do_sample": False, "eos_token_id": end, "pad_token_id": end, "max_new_tokens": tokens}
        return self.model.generate(**inputs, **greedy, **given, **options)


@contextlib.contextmanager
def _patched(model: Any, shape: Shape, backend: Backend, **options: Any) -> Iterator[Answerer]:
    model.set_attn_implementation("sdpa")
    with llava15_fast.patched(model, backend, **options) as handle:
        yield Answerer(model, ran=partial(_ran, handle))


def _ran(handle: llava15_fast.PatchHandle) -> dict[str, Any]:
    """Calls of each part of a patched model by backend; if fallback instead, no time is ours."""
    found = handle.report().rows
    instead = {row.path: row.fallbacks for row in found if row.fallbacks}
    assert not instead, f"fallback instead: {instead}"
    return {"ran": {row.path: row.ran for row in found if row.ran}}


@contextlib.contextmanager
def _unpatched(model: Any, shape: Shape, backend: Backend, attention: str) -> Iterator[Answerer]:
    model.set_attn_implementation(attention)
    yield Answerer(model)


@contextlib.contextmanager
def _static(model: Any, shape: Shape, backend: Backend) -> Iterator[Answerer]:
    """transformers' fastest way: a static cache, and on a GPU its decode step compiled into a CUDA graph.

    One cache for all answers: the addresses of another would be recorded anew, within the time of the first tokens.
    """
    caches: dict[int, StaticCache] = {}

    def options(ids: torch.Tensor) -> dict[str, Any]:
        batch, length = ids.shape
        if batch not in caches:
            room = max(shape.new_tokens, FORCED + 1)
            caches[batch] = StaticCache(config=model.config.text_config, max_cache_len=length + room)
        caches[batch].reset()
        return {CACHE: caches[batch]}

    def ran() -> dict[str, Any]:
        counters = torch._dynamo.utils.counters
        found = {"graphs": counters["stats"]["unique_graphs"], "cudagraph_skips": counters["inductor"]["cudagraph_skips"]}
        return {"compiled": found}

    model.set_attn_implementation("sdpa")
    torch._dynamo.utils.counters.clear()
    try:
        yield Answerer(model, options, ran)
    finally:
        torch._dynamo.reset()


COMPILED = "static + compile"
PROVIDERS: dict[str, Callable[..., contextlib.AbstractContextManager[Answerer]]] = {
    "patched": _patched,
    "sdpa": partial(_unpatched, attention="sdpa"),
    "patched, no graph": partial(_patched, cuda_graph=False),
    "eager": partial(_unpatched, attention="eager"),
    COMPILED: _static,
}


def is_ours(provider: str) -> bool:
    return provider.startswith("patched")


def answer(answerer: Answerer, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """(B, tokens) greedy ids.

    Raises:
        AssertionError: the end token came.
    """
    new = answerer.generate(inputs, tokens)[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] == tokens, f"{new.shape[1]} tokens were generated, expected {tokens}"
    return new


# --- verified


def forced_logits(answerer: Answerer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(FORCED + 1, B, vocabulary) of the last prompt token and of given tokens after it, by the `generate` that is timed.

    A bias on what follows the last token gives them, for that is an option that a fast loop takes as well.
    """
    last = inputs["input_ids"][:, -1].tolist()
    given = [token for token in range(8, 8 + FORCED + len(last)) if token not in last][:FORCED]
    pairs = [*((token, given[0]) for token in set(last)), *pairwise(given)]
    bias = [[list(pair), 1e4] for pair in pairs]
    options = {"sequence_bias": bias, "output_logits": True, "return_dict_in_generate": True}
    output = answerer.generate(inputs, FORCED + 1, **options)
    found = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert (found[:, :FORCED] == torch.tensor(given, device=found.device)).all(), f"tokens {found.tolist()}, given {given}"
    # `generate` widens them, which loses nothing.
    return torch.stack(output.logits).to(answerer.model.dtype)


@dataclass(frozen=True)
class Verifier:
    """What is known of the right answer to some prompts."""

    inputs: dict[str, torch.Tensor]
    exact: torch.Tensor
    expected: torch.Tensor
    ids: torch.Tensor | None

    @classmethod
    def make(cls, model: Any, prompts: Prompts, shape: Shape) -> Verifier:
        tokens, patches = prompts.inputs["input_ids"].shape[1], max(1, prompts.patches // shape.batch)
        count = max(1, min(shape.batch, VERIFIED_PATCHES // patches, VERIFIED_TOKENS // tokens))
        inputs = prompts.first(count, shape.images)
        with PROVIDERS["sdpa"](model, shape, "auto") as answerer:
            with in_float32(model):
                exact = forced_logits(answerer, inputs).double()
            expected = forced_logits(answerer, inputs)
            exactly = next(model.parameters()).dtype == torch.float32
            ids = answer(answerer, inputs, min(shape.new_tokens, 16)) if exactly else None
        return cls(inputs, exact, expected, ids)

    def check(self, answerer: Answerer, what: str) -> dict[str, Any]:
        """What is to be said in a row.

        Raises:
            AssertionError: the logits break the error rule, or a token id in float32 is another.
        """
        logits = forced_logits(answerer, self.inputs)
        assert_close(logits, self.expected, self.exact, f"{what}: logits")
        if self.ids is not None:
            ids = answer(answerer, self.inputs, self.ids.shape[1])
            assert torch.equal(ids, self.ids), f"{what}: token ids {ids.tolist()}, expected {self.ids.tolist()}"
        return {
            "verified": True,
            "verified_prompts": len(self.inputs["input_ids"]),
            "logits_error": worst(logits, self.exact)[0],
            "sdpa_logits_error": worst(self.expected, self.exact)[0],
        }


# --- timed


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def quantiles(samples: list[float]) -> dict[str, float]:
    found = Timing.of(samples, "perf_counter")
    return {name: round(getattr(found, name), 3) for name in ("p10", "p50", "p90")}


def time_answers(answerer: Answerer, prompts: Prompts, shape: Shape, repeats: int) -> dict[str, Any]:
    """The figures of the module's table, of one provider."""
    inputs, device = prompts.inputs, prompts.inputs["input_ids"].device

    def ask(tokens: int) -> float:
        return seconds(lambda: answer(answerer, inputs, tokens), device)

    ask(shape.new_tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, whole = zip(*((1e3 * ask(1), 1e3 * ask(shape.new_tokens)) for _ in range(repeats)), strict=True)
    each = [(all_ - one) / (shape.new_tokens - 1) for one, all_ in zip(first, whole, strict=True)]
    row: dict[str, Any] = {
        "time_to_first_token_ms": quantiles(first),
        "generate_ms": quantiles(whole),
        "ms_per_token": quantiles(each),
        "tokens_per_s": round(1e3 * shape.batch / quantiles(each)["p50"], 1),
        "peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else None,
        "repetitions": repeats,
    }
    if shape.images:
        pixels, grids = inputs["pixel_values"].to(answerer.model.dtype), inputs["image_grid_thw"]
        with torch.no_grad():
            taken = [1e3 * seconds(lambda: answerer.model.model.visual(pixels, grid_thw=grids), device) for _ in range(repeats)]
        row["vision_ms"] = quantiles(taken)
    return row


def time_first_calls(make: Callable[[], Any], prompts: Prompts, shape: Shape) -> dict[str, Any]:
    """What a user of ours waits for once: with no kernel compiled, and in a later process that finds them in the cache."""

    def ask() -> float:
        forget_kernels()
        with make() as answerer:
            return time_call(answerer, prompts, shape)

    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        cold = ask()
        # Beside the description of each kernel lies one of its group of files.
        compiled = len([file for file in Path(folder).glob("*/*.json") if file.name[:2] != "__"])
        return {"first_call_s": cold, "first_call_warm_s": ask(), "kernels_compiled": compiled}


def time_call(answerer: Answerer, prompts: Prompts, shape: Shape) -> float:
    device = prompts.inputs["input_ids"].device
    return round(seconds(lambda: answer(answerer, prompts.inputs, shape.new_tokens), device), 3)


def forget_kernels() -> None:
    """What this process has compiled or loaded: as if it had just begun."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "llava15_kernels":
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()


def measure(
    model: Any,
    name: str,
    shape: Shape,
    providers: list[str],
    repeats: int,
    device: torch.device,
    failed: Callable[[Exception], None] = lambda error: None,
    backend: Backend = "auto",
    first_calls: bool = False,
) -> Iterator[dict[str, Any]]:
    """A row for each provider as it comes: timed if it could be verified. `failed` hears of any other error and may raise."""
    prompts = Prompts.make(model.config, shape, device)
    about = {
        "config": name, **asdict(shape), "prompt_tokens": prompts.inputs["input_ids"].shape[1],
        "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    if shape.images:
        taken = [1e3 * seconds(lambda: preprocess(model.config, prompts.images), device) for _ in range(min(repeats, 3))]
        about["preprocessing_ms"] = quantiles(taken)
    try:
        verifier = Verifier.make(model, prompts, shape)
    except Exception as error:  # no memory for float32, say: nothing is timed that cannot be verified
        failed(error)
        for provider in providers:
            yield {**about, "provider": provider, **_failure("cannot verify", error)}
        return
    for provider in providers:
        row = {**about, "provider": provider}
        make = partial(PROVIDERS[provider], model, shape, backend)
        try:
            times = time_first_calls(make, prompts, shape) if first_calls and provider == "patched" else {}
            with make() as answerer:
                if first_calls and provider == COMPILED:
                    times = {"first_call_s": time_call(answerer, prompts, shape)}
                row |= verifier.check(answerer, f"{name}, {shape}, {provider}")
                times |= time_answers(answerer, prompts, shape, repeats)
                row |= answerer.ran() | times
            yield {**row, "status": "ok"}
        except AssertionError as error:
            yield {**row, "status": "wrong", "verified": False, "error": str(error)}
        except Exception as error:
            failed(error)
            # A competitor that cannot run this is no failure; ours has to.
            yield {**row, **_failure("failed" if is_ours(provider) else "cannot run", error)}


def _failure(status: str, error: Exception) -> dict[str, Any]:
    message = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    return {"status": status, "verified": False, "error": message}


def describe(row: dict[str, Any]) -> str:
    """A row in words."""
    shape = Shape(**{name: row[name] for name in Shape.__dataclass_fields__})
    if row["status"] != "ok":
        return f"{row['config']}, {shape}, {row['provider']}: {row['status']} {row.get('error', '')}".rstrip()
    memory = "" if row["peak_gb"] is None else f", {row['peak_gb']} GB"
    return (
        f"{row['config']}, {shape}, {row['provider']:17}: first token {row['time_to_first_token_ms']['p50']:9.2f} ms, then "
        f"{row['ms_per_token']['p50']:8.3f} ms each, all {row['generate_ms']['p50']:9.1f} ms{memory}"
    )


# --- the command


def count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def main(argv: list[str] | None = None) -> int:
    """Status 0: all was verified; 1: something is wrong; 130: stopped by hand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generate",
        description="Times whole answers of the model: preprocessing, first token, every further token, memory, first call; "
        "patched, unpatched with transformers' attentions, and with its static cache and torch.compile. "
        "Each provider is verified before it is timed. Several values of an option are combined with each other.",
    )
    several: dict[str, Any] = {"nargs": "+", "metavar": "N"}
    parser.add_argument(
        "--config",
        required=True,
        metavar="4b|8b|tiny|DIR",
        help="Random weights at these shapes, or a folder with a checkpoint.",
    )
    parser.add_argument(
        "--image-size", type=positive, default=[1120], **several, help="Pixels on a side, a multiple of 28. Default: 1120."
    )
    parser.add_argument(
        "--images", type=count, default=[1], **several, help="Images in each prompt; 0 for text alone. Default: 1."
    )
    parser.add_argument(
        "--batch", type=positive, default=[1], **several, help="Prompts that are answered together. Default: 1."
    )
    parser.add_argument("--context", type=positive, default=[64], **several, help="Tokens of text in each prompt. Default: 64.")
    parser.add_argument("--new-tokens", type=positive, default=256, metavar="N", help="Tokens in each answer. Default: 256.")
    parser.add_argument(
        "--provider", choices=tuple(PROVIDERS), action="append", metavar="NAME",
        help=f"Only this one of {', '.join(map(repr, PROVIDERS))}; may be repeated. Default: all of them.",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="Answers that are timed. Default: 5.")
    parser.add_argument(
        "--first-calls", action="store_true", help="Also times the first call of a process, for which kernels are compiled."
    )
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, help="Of the weights. Default: bfloat16 on a GPU, else float32.")
    parser.add_argument(
        "--out", type=output_folder, default=Path("generate"), metavar="DIR",
        help="The folder of generate.jsonl and generate.log, to which each row is appended as soon as it is measured.",
    )  # fmt: skip
    parser.add_argument(
        "--commit", metavar="HASH", help="The commit that the rows name; by default git's, or what the file COMMIT says."
    )
    arguments = parser.parse_args(argv)
    if arguments.config not in (*TEXT, "tiny") and not (Path(arguments.config) / "config.json").is_file():
        parser.error(f"--config {arguments.config}: neither 4b, 8b or tiny nor a folder with a checkpoint")
    if arguments.new_tokens < 2:
        parser.error("--new-tokens has to be at least 2, for a time per token")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    sizes, images, batches, contexts = arguments.image_size, arguments.images, arguments.batch, arguments.context
    shapes = [Shape(*values, arguments.new_tokens) for values in itertools.product(sizes, images, batches, contexts)]
    side = side_of(configuration(arguments.config))
    if odd := [size for size in sizes if size % side and any(images)]:
        parser.error(f"--image-size {odd[0]}: expected a multiple of {side}, so that nothing is resized")
    shapes = list(dict.fromkeys(shape if shape.images else Shape(0, 0, *list(asdict(shape).values())[2:]) for shape in shapes))
    providers = arguments.provider or list(PROVIDERS)
    rows = Rows(arguments.out, "generate", environment(arguments.commit))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    wrong = 0
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("building the model", total=len(shapes) * len(providers))
            model = build(arguments.config, device, dtype)
            for shape in shapes:
                progress.update(task, description=str(shape))
                for row in measure(
                    model, arguments.config, shape, providers, arguments.repeats, device, first_calls=arguments.first_calls
                ):
                    rows.add(kind="generate", dry_run=device.type != "cuda", **row)
                    rows.log(describe(row))
                    wrong += row["status"] in ("wrong", "failed", "cannot verify")
                    progress.advance(task)
    except OSError as error:  # a checkpoint that lacks a file, a full disk
        parser.error(str(error).splitlines()[0])
    except KeyboardInterrupt:
        rows.log(f"stopped by hand; {len(rows.rows)} new rows are in {rows.file}")
        return 130
    rows.log(f"{len(rows.rows)} new rows in {rows.file}" + (f"; {wrong} of them wrong or failed" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
