"""The command line: `llava15-fast demo`, `generate`, `verify`, `warmup` and `env`.

Answers go to stdout, everything else to stderr. Errors are one line on stderr and exit status 2; LLAVA15_DEBUG=1 shows the
traceback. The docstring of a command's function is its description in `--help`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, logging

from llava15_kernels import INTERPRETED

from .. import LlavaOnevision1_5Config, patch, verify, warmup
from ..model.processing import read_image
from ..patching.auto import BACKENDS
from ..patching.report import as_text
from .env import environment, table

PROMPT = "Describe this image."

MODEL = {"required": True, "metavar": "DIR", "help": "a folder in the published format, or a repository"}
IMAGE = {"action": "append", "default": [], "metavar": "FILE"}
BACKEND = {"choices": BACKENDS, "default": "auto", "help": "what the patched model runs"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class Answer(NamedTuple):
    """New token ids of one prompt, their text, and the end-to-end latency in seconds."""

    ids: list[int]
    text: str
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = _arguments(argv)
    try:
        return arguments.run(arguments)
    except Exception as error:
        if os.environ.get("LLAVA15_DEBUG") == "1":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"llava15-fast: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("llava15-fast: interrupted", file=sys.stderr)
        return 130


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="llava15-fast", description="LLaVA-OneVision-1.5 with hand-written Triton kernels.")
    commands = parser.add_subparsers(required=True, metavar="demo | generate | verify | warmup | env")

    def command(run: Callable[[argparse.Namespace], int], summary: str) -> Callable[..., Any]:
        added = commands.add_parser(run.__name__.removeprefix("_"), help=summary, description=run.__doc__)
        added.set_defaults(run=run)
        return added.add_argument

    add = command(_demo, "describe the sample images with the small trained checkpoint, unpatched and patched")
    add("--backend", **BACKEND)
    add("--images", type=_positive, metavar="N", help="only the first N sample images")

    add = command(_generate, "ask a checkpoint about images")
    add("--model", **MODEL)
    add("--image", **IMAGE, help="an image file; may be repeated")
    add("--prompt", required=True, metavar="TEXT", help="what to ask")
    add("--no-patch", action="store_true", help="do not patch the model")
    add("--compare", action="store_true", help="run unpatched and patched, and compare the token ids")
    add("--max-new-tokens", type=_positive, default=256, metavar="N", help="maximum number of new tokens (default %(default)s)")
    add("--backend", **BACKEND)

    add = command(_verify, "compare the patched model with eager and a higher-precision reference, on your weights and image")
    add("--model", **MODEL)
    add("--image", **IMAGE, help="an image file; by default a sample image")
    add("--prompt", default=PROMPT, metavar="TEXT", help="what to ask (default %(default)r)")
    add("--max-new-tokens", type=_positive, default=32, metavar="N", help="maximum number of new tokens (default %(default)s)")
    add("--backend", **BACKEND)

    add = command(_env, "versions, device, backend and kernel cache, for a bug report")
    add("--json", action="store_true", help="as JSON")

    add = command(_warmup, "compile the kernels of a checkpoint before the first request")
    add("--model", **MODEL)
    add("--backend", **BACKEND)
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def load(folder: str | Path) -> tuple[Any, Any]:
    """Model in evaluation mode and processor of a checkpoint, on the GPU if there is one.

    Raises:
        OSError: the folder, or a file in it, is missing or cannot be read.
        ValueError: it holds another model, or tensors or placeholder tokens are not this model's.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not Path(folder).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder)):
        raise FileNotFoundError(f"no checkpoint folder {str(folder)!r}")
    config, known = AutoConfig.from_pretrained(folder), LlavaOnevision1_5Config
    if not isinstance(config, known):
        raise ValueError(f"{folder} holds a model of type {config.model_type!r}, expected {known.model_type!r}")
    processor = AutoProcessor.from_pretrained(folder)
    options = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True}  # said below, by their names
    options |= {"device_map": "auto"} if torch.cuda.is_available() else {}
    model, report = AutoModelForImageTextToText.from_pretrained(folder, **options)
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(f"{folder}: {name} has shape {tuple(found)}, expected {tuple(expected)} by the configuration")
    for kind in ("missing", "unexpected"):
        if keys := sorted(report[f"{kind}_keys"]):
            raise ValueError(f"{folder} has {len(keys)} {kind} tensors, the first is {keys[0]}: the output would be noise")
    for kind in ("image", "video"):
        expected, found = getattr(config, f"{kind}_token_id"), getattr(processor, f"{kind}_token_id")
        if expected != found or processor.tokenizer.encode(getattr(processor, f"{kind}_token")) != [expected]:
            raise ValueError(f"{folder}: the tokenizer's {kind} placeholder is {found}, the model's {kind}_token_id {expected}")
    return model.eval(), processor


def prepare(model: Any, processor: Any, prompt: str, images: Sequence[str | Path]) -> Any:
    """What the model is given for one prompt about `images`."""
    content = [{"type": "image", "image": str(image)} for image in images] + [{"type": "text", "text": prompt}]
    chat = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(chat, **options).to(model.device)


def ask(model: Any, processor: Any, prompt: str, images: Sequence[str | Path], max_new_tokens: int) -> Answer:
    """One greedy answer to `prompt` about `images`.

    Raises:
        ValueError: an image cannot be read.
    """
    inputs = prepare(model, processor, prompt, images)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - start
    return Answer(ids, processor.decode(ids, skip_special_tokens=True), seconds)


def assets_folder() -> Path:
    """Where the small checkpoint and the sample images lie, in a checkout or in an installation."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "assets", here.parent / "assets"):
        if (folder / "scenes_checkpoint").is_dir():
            return folder
    raise FileNotFoundError(f"no assets folder beside {here}")


def _generate(arguments: argparse.Namespace) -> int:
    """Loads and patches a checkpoint and answers one prompt about all of the images. The answer goes to stdout, the latency and
    the report of what ran to stderr."""
    if arguments.no_patch and arguments.compare:
        raise ValueError("--compare and --no-patch are mutually exclusive")
    for image in arguments.image:
        read_image(image)  # before a large checkpoint is loaded
    model, processor = load(arguments.model)
    question = (processor, arguments.prompt, arguments.image, arguments.max_new_tokens)
    plain = ask(model, *question) if arguments.no_patch or arguments.compare else None
    handle = None if arguments.no_patch else patch(model, arguments.backend)
    answer = plain if handle is None else ask(model, *question)
    print(answer.text)
    state = "not patched" if handle is None else f"patched\n{handle.report()}"
    print(f"{len(answer.ids)} tokens in {answer.seconds:.2f} s, {state}", file=sys.stderr)
    same = plain is None or plain.ids == answer.ids
    if arguments.compare:
        verdict = "identical" if same else "DIFFERENT"
        print(f"unpatched: {plain.text!r} in {plain.seconds:.2f} s; token ids {verdict}", file=sys.stderr)
    return 0 if same else 1


def _verify(arguments: argparse.Namespace) -> int:
    """Answers a prompt unpatched and patched and compares both with a higher-precision reference: errors of every block and of
    the logits, the first token that differs, and a verdict. The exit status is 1 if verification fails."""
    images = arguments.image or sorted((assets_folder() / "samples").glob("*.png"))[:1]
    for image in images:
        read_image(image)  # before a large checkpoint is loaded
    model, processor = load(arguments.model)
    inputs = prepare(model, processor, arguments.prompt, images)
    found = verify(model, inputs, max_new_tokens=arguments.max_new_tokens, backend=arguments.backend)
    print(found)
    return 0 if found.ok else 1


def _env(arguments: argparse.Namespace) -> int:
    """Shows versions and whether they are supported, the GPU, the default backend, and the cache of compiled kernels."""
    found = environment()
    print(json.dumps(found, indent=1) if arguments.json else as_text(table(found)))
    return 0


def _warmup(arguments: argparse.Namespace) -> int:
    """Loads and patches a checkpoint and runs small requests of every kind, which fills Triton's cache of compiled kernels on
    disk."""
    model, _ = load(arguments.model)
    handle = patch(model, arguments.backend)
    taken = warmup(model, lambda request, seconds: print(f"{seconds:7.2f} s  {request}", flush=True))
    print(f"{sum(taken.values()):7.2f} s  total", flush=True)
    print(handle.report(), file=sys.stderr)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    """Describes the sample images with the small trained checkpoint that ships with the project, unpatched and patched. The
    exit status is 1 if any token id differs."""
    assets = assets_folder()
    model, processor = load(assets / "scenes_checkpoint")
    images = sorted((assets / "samples").glob("*.png"))[: arguments.images]
    unpatched = [ask(model, processor, PROMPT, [image], 64) for image in images]
    handle = patch(model, arguments.backend)
    stdout = Console(highlight=False, markup=False)
    same = True
    for image, before in zip(images, unpatched, strict=True):
        after = ask(model, processor, PROMPT, [image], 64)
        identical = before.ids == after.ids
        same &= identical
        stdout.print(str(image), style="bold", soft_wrap=True)
        stdout.print(f"  unpatched  {before.text!r}  {before.seconds:.2f} s")
        stdout.print(f"  patched    {after.text!r}  {after.seconds:.2f} s")
        stdout.print(f"  token ids  {'identical' if identical else 'DIFFERENT'}", style="" if identical else "red")
    print(handle.report())
    if arguments.backend == "auto" and model.device.type == "cpu" and not INTERPRETED:
        stdout.print("\nThe same through the Triton kernels, in Triton's interpreter:")
        sys.stdout.flush()
        # In a process of its own: Triton decides at import whether it interprets.
        command = [sys.executable, "-m", "llava15_fast", "demo", "--backend", "triton", "--images", "1"]
        variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        same &= subprocess.run(command, env=variables, check=False).returncode == 0
    return 0 if same else 1
