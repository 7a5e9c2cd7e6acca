"""Checkpoint files: validation of a local folder, and the tensor names of the two formats.

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

from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import SplitModulelist, WeightConverter, WeightRenaming
from transformers.modeling_utils import _add_variant


def published_names(base_prefix: str) -> list[WeightRenaming]:
    """Published names -> module names, reversible. `base_prefix` is "model." for the generation class, else ""."""
    return [
        WeightRenaming(r"^visual", f"{base_prefix}visual"),
        WeightRenaming(r"^model(?!\.(language_model|visual))", f"{base_prefix}language_model"),
    ]


def upstream_names() -> list[WeightConverter | WeightRenaming]:
    """The upstream port's two one-row embedding tables -> parameters. Its other names are the module names."""
    return [
        WeightConverter("visual.class_embedding.weight", "visual.class_embedding", operations=[SplitModulelist(dim=0)]),
        WeightRenaming("visual.class_pos_emb.weight", "visual.class_pos_emb"),
    ]


def register_tensor_names(model_class: Any) -> None:
    """Registers both formats for a class with a `published_prefix`; transformers looks them up by class name."""
    names = published_names(model_class.published_prefix) + upstream_names()
    register_checkpoint_conversion_mapping(model_class.__name__, names, overwrite=True)


def check_checkpoint_files(name: Any, subfolder: str = "", variant: str | None = None) -> None:
    """Opens the header of every safetensors file of a local checkpoint; repository names are not checked.

    Args:
        name: a folder; if it holds an adapter, the folder of its base model is checked too, since transformers loads it.
        subfolder, variant: as of `from_pretrained`.

    Raises:
        OSError: an index is unreadable or points outside the folder, a file is missing or corrupt, or there are only pickles.
    """
    folders = [Path(str(name)) / subfolder]
    for adapter in (Path(str(name), "adapter_config.json"), folders[0] / "adapter_config.json"):
        if adapter.is_file():
            base = Path(str(_read(adapter, "base_model_name_or_path")))
            folders += [base, base / subfolder]
    for folder in dict.fromkeys(folders):
        if folder.is_dir():
            _check_folder(folder, variant)


def _check_folder(folder: Path, variant: str | None) -> None:
    for index in folder.glob("*.safetensors.index*.json"):
        for file in _files_of(index):
            if not file or Path(file).name != file:
                raise OSError(f"{index} names the file {file!r}, expected a file of the same folder")
    single = folder / _add_variant("model.safetensors", variant)
    index = folder / _add_variant("model.safetensors.index.json", variant)
    files = {single.name} if single.is_file() else _files_of(index) if index.is_file() else set()
    pickles = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if not files and not any(folder.glob("*.safetensors")) and pickles:
        raise OSError(f"{pickles[0]} is a pickle, which can run code as it is loaded: only safetensors files are read")
    for file in sorted(files):
        path = folder / file
        if not path.is_file():
            raise OSError(f"{path} is missing, expected because {index.name} names it")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"{path} is not a complete safetensors file: {error}") from None


def _files_of(index: Path) -> set[str]:
    names = _read(index, "weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise OSError(f"cannot read {index}: expected JSON with a weight_map of file names")
    return set(names.values())


def _read(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text()).get(key)
    except (ValueError, AttributeError, RecursionError) as error:
        raise OSError(f"cannot read {path}: expected JSON with a {key} ({error})") from None
