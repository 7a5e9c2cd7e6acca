"""Compiles the kernels of a patched model ahead of the first request.

Triton compiles a kernel per dtype and head_dim, and decode attention also per number of KV splits, rounded up to a power of 2.
The requests here cover these variants; their sizes are no workload. Compiled kernels stay in Triton's cache on disk
(TRITON_CACHE_DIR) for later processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from ..model.releases import CACHE, as_argument

# Prompt lengths with different numbers of KV splits; batch sizes with few splits per prompt, down to one; images of 560 x 560
# and 1120 x 1120: with and without a CUDA graph.
PROMPTS = (33, 600, 1700, 3500)
BATCHES = (2, 16, 32, 64)
GRIDS = ((40, 40), (80, 80))

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def warmup(model: nn.Module, progress: Callable[[str, float], None] | None = None) -> dict[str, float]:
    """Runs small requests of every kind on a patched `LlavaOnevision1_5ForConditionalGeneration`.

    Args:
        progress: called with the name and seconds of each request when it is done.

    Returns:
        Request name -> seconds.
    """
    taken = {}
    with torch.inference_mode():
        for request, run in _requests(model):
            start = time.perf_counter()
            run().tolist()  # synchronizes
            taken[request] = time.perf_counter() - start
            if progress is not None:
                progress(request, taken[request])
    return taken


def _requests(model: nn.Module) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    vision, device = model.config.vision_config, model.device
    longest = model.config.text_config.max_position_embeddings - GREEDY["max_new_tokens"]

    def generate(ids: torch.Tensor, **inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: model.generate(input_ids=ids, **inputs, **GREEDY)

    def several_tokens(ids: torch.Tensor) -> torch.Tensor:
        """As speculative decoding asks for."""
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1)[CACHE]
        return model(input_ids=ids[:, :3], **as_argument(cache), logits_to_keep=1).logits

    for length in PROMPTS:
        if length <= longest:
            ids = torch.ones(1, length, dtype=torch.long, device=device)
            yield f"text, {length} tokens", generate(ids)
            yield f"text, {length} tokens, then 3 at once", partial(several_tokens, ids)
    for h, w in GRIDS:
        tokens = h * w // model.model.visual.spatial_merge_size**2
        if tokens + 8 > longest:
            continue
        ids = torch.ones(1, tokens + 8, dtype=torch.long, device=device)
        ids[0, 4 : 4 + tokens] = model.config.image_token_id
        pixels = torch.zeros(h * w, vision.in_channels * vision.patch_size**2, dtype=model.dtype, device=device)
        for again in ("", ", again"):
            grid = torch.tensor([[1, h, w]], device=device)
            yield f"an image of {tokens} tokens{again}", generate(ids, pixel_values=pixels, image_grid_thw=grid)
    for prompts in BATCHES:
        ids = torch.ones(prompts, 8, dtype=torch.long, device=device)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        yield f"{prompts} prompts, padded", generate(ids, attention_mask=mask)
