"""`enable`, `disable`: patch models of this class automatically when `from_pretrained` loads them.

For programs that load the model themselves and cannot be changed: `python -m llava15_fast.run -m lmms_eval ...`. All that is
replaced is `from_pretrained` of `LlavaOnevision1_5ForConditionalGeneration`, which the Auto classes call too.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, get_args

from transformers.utils import is_flash_attn_2_available

from llava15_kernels._dispatch import Backend

from ..model.modeling import LlavaOnevision1_5ForConditionalGeneration
from .api import patch
from .targets import PatchError

logger = logging.getLogger("llava15_fast")

BACKENDS = get_args(Backend)


def enable(backend: Backend = "auto", *, cuda_graph: bool = True) -> None:
    """From now on every `LlavaOnevision1_5ForConditionalGeneration` is patched when it is loaded, also through Auto classes.

    If `patch` refuses a model, it is loaded unpatched and the reason is logged. `attn_implementation="flash_attention_2"`
    becomes "sdpa" if flash-attn is not installed, since it is only used in fallbacks. Calling `enable` again changes the
    options. Models that are already loaded are not affected.

    Args:
        backend, cuda_graph: as of `patch`.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {BACKENDS}")
    disable()
    # Of PreTrainedModel; called with the requested subclass.
    original = LlavaOnevision1_5ForConditionalGeneration.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        # Auto classes pass it in the configuration.
        attention = kwargs.get("attn_implementation") or getattr(kwargs.get("config"), "_attn_implementation", None)
        if attention == "flash_attention_2" and not is_flash_attn_2_available():
            logger.warning("flash-attn is not installed: attn_implementation is 'sdpa' for fallbacks")
            kwargs["attn_implementation"] = "sdpa"
        loaded = original(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        try:
            patch(model, backend, cuda_graph=cuda_graph)
        except (PatchError, RuntimeError) as error:
            logger.warning("the model runs without the kernels: %s", error)
        else:
            logger.info("patched %s, backend %s", type(model).__name__, backend)
        return loaded

    LlavaOnevision1_5ForConditionalGeneration.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment, method-assign]


def disable() -> None:
    """Undoes `enable` for models loaded from now on. Patched models stay patched; use `unpatch` for them."""
    if "from_pretrained" in vars(LlavaOnevision1_5ForConditionalGeneration):
        del LlavaOnevision1_5ForConditionalGeneration.from_pretrained
