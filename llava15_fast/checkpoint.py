"""Checkpoint files: a check of what lies in a folder, and the tensor names of the two formats.

| module                      | published (read and written) | upstream port (read)             |
|-----------------------------|------------------------------|----------------------------------|
| model.visual.*              | visual.*                     | model.visual.*                   |
| model.language_model.*      | model.*                      | model.language_model.*           |
| lm_head.weight              | lm_head.weight               | lm_head.weight                   |
| model.visual.class_*        | visual.class_*               | model.visual.class_*.weight, (1, n) |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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


def check_checkpoint_files(folder: Any) -> None:
    """Opens the header of every safetensors file that a local checkpoint consists of; a repository name is not checked.

    Raises:
        OSError: an index that cannot be read or points out of the folder, a file that is missing or corrupt, or only pickles.
    """
    folder = Path(str(folder))
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"} if (folder / "model.safetensors").is_file() else set()
    if not files and index.is_file():
        try:
            files = set(json.loads(index.read_text())["weight_map"].values())
            if strange := [name for name in files if not isinstance(name, str)]:
                raise TypeError(f"it names the file {strange[0]!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"cannot read {index}: expected JSON with a weight_map ({error})") from None
    pickles = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if not files and not any(folder.glob("*.safetensors")) and pickles:
        raise OSError(f"{pickles[0]} is a pickle, which can run code as it is loaded: only safetensors files are read")
    for name in sorted(files):
        path = folder / name
        if Path(name).name != name:
            raise OSError(f"{index} names the file {name!r}, expected a file of the same folder")
        if not path.is_file():
            raise OSError(f"{path} is missing, expected because {index.name} names it")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"{path} is not a complete safetensors file: {error}") from None
