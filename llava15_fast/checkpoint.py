"""Tensor names of the two checkpoint formats.

| module                      | published (read and written) | upstream port (read)             |
|-----------------------------|------------------------------|----------------------------------|
| model.visual.*              | visual.*                     | model.visual.*                   |
| model.language_model.*      | model.*                      | model.language_model.*           |
| lm_head.weight              | lm_head.weight               | lm_head.weight                   |
| model.visual.class_*        | visual.class_*               | model.visual.class_*.weight, (1, n) |
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming


class ReshapeToParameter(ConversionOps):
    """An embedding table of one row, (1, n), in the shape of the parameter that holds the same numbers."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        expected = kwargs["model"].get_parameter(kwargs["full_layer_name"]).shape
        return {target_patterns[0]: tensor.reshape(expected)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("saving writes the published names and never comes here")


def published_names(base_prefix: str) -> list[WeightRenaming]:
    """Published names -> module names, reversible. `base_prefix` is "model." below the generation class, else ""."""
    return [
        WeightRenaming(r"^visual", f"{base_prefix}visual"),
        WeightRenaming(r"^model(?!\.(language_model|visual))", f"{base_prefix}language_model"),
    ]


def upstream_names() -> list[WeightConverter]:
    """The upstream port's two embedding tables -> parameters. Its other names are the module names."""
    return [
        WeightConverter(f"visual.{name}.weight", f"visual.{name}", operations=[ReshapeToParameter()])
        for name in ("class_embedding", "class_pos_emb")
    ]
