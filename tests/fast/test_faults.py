"""Strange and hostile inputs: a clear error that names the value, or the answer of the plain path."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from triton.runtime.errors import OutOfResources, PTXASError

import llava15_fast
from llava15_fast import LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Processor
from llava15_fast.fast.runtime import RUNTIME, FastModule
from llava15_fast.patching import api
from llava15_kernels.unchecked import unchecked

ROOT = Path(__file__).parents[2]
CHECKPOINT, TINY = ROOT / "assets/scenes_checkpoint", ROOT / "tests/golden/tiny_hub"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def processor():
    return LlavaOnevision1_5Processor.from_pretrained(CHECKPOINT)


def pixels(processor, image, **options):
    return processor(images=image, text=IMAGE, return_tensors="pt", **options)


def random_rgb(width, height, seed=0):
    return np.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def equal(processor, image, rgb, **options):
    """`image` gives what the 8-bit RGB array `rgb`, converted by hand, gives."""
    found, expected = pixels(processor, image, **options), pixels(processor, Image.fromarray(rgb))
    assert torch.equal(found.image_grid_thw, expected.image_grid_thw), rgb.shape
    assert torch.equal(found.pixel_values, expected.pixel_values), rgb.shape
    assert found.pixel_values.isfinite().all()


def refused(call, match, error=ValueError):
    with pytest.raises(error, match=match):
        call()


SIZES = [(1, 1), (1, 2), (2, 1), (3, 3), (1, 200), (200, 1), (13, 27), (28, 28), (29, 55), (112, 84), (1000, 30), (30, 1999)]


def grey_rgb(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_modes(processor, size):
    rgb = random_rgb(*size)
    image, grey = Image.fromarray(rgb), rgb[..., 0]
    equal(processor, image, rgb)
    equal(processor, Image.fromarray(grey), grey_rgb(grey))
    equal(processor, Image.fromarray(grey > 99), grey_rgb((grey > 99) * np.uint8(255)))
    alpha = (random_rgb(*size, seed=1)[..., :1] > 99) * np.uint8(255)
    equal(processor, Image.fromarray(np.concatenate([rgb, alpha], -1)), np.where(alpha, rgb, np.uint8(255)))
    grey_alpha = Image.fromarray(np.concatenate([grey[..., None], alpha], -1), "LA")
    equal(processor, grey_alpha, np.where(alpha, grey_rgb(grey), np.uint8(255)))
    palette = Image.fromarray(grey, "P")
    colours = random_rgb(256, 1, seed=2)[0]
    palette.putpalette(colours.tobytes())
    equal(processor, palette, colours[grey])
    palette.info["transparency"] = int(grey[0, 0])
    on_white = np.where(grey[..., None] == grey[0, 0], np.uint8(255), colours[grey])
    equal(processor, palette, on_white)
    cmyk = np.concatenate([rgb, np.zeros_like(alpha)], -1)
    equal(processor, Image.fromarray(cmyk, "CMYK"), 255 - rgb)
    deep = grey.astype(np.uint16) * 257
    deep.flat[0] = 65535  # values to 255 count as 8-bit ones
    by_hand = grey_rgb((deep // 257).astype(np.uint8))
    equal(processor, Image.fromarray(deep), by_hand)
    equal(processor, Image.fromarray(deep.astype(np.int32)), by_hand)
    light = np.maximum(grey, 2)  # floats up to 1 count from 0 to 1
    equal(processor, Image.fromarray(light.astype(np.float32)), grey_rgb(light))


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 4], ids=str)
def test_arrays(processor, size):
    rgb = random_rgb(*size)
    rgb.flat[0] = 255
    alpha = np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], -1)
    wide = np.zeros((size[1], 2 * size[0], 5), np.uint8)
    wide[:, ::2, 1:4] = rgb
    arrays = {
        "uint8": rgb,
        "uint16": rgb.astype(np.uint16) * 257,
        "int64": rgb.astype(np.int64),
        "big-endian": (rgb.astype(np.uint16) * 257).astype(">u2"),
        "float": rgb.astype(np.float32),
        "float to 1": rgb / 255,
        "half to 1": (rgb / 255).astype(np.float16),
        "RGBA": alpha,
        "fortran": np.asfortranarray(rgb),
        "strided": wide[:, ::2, 1:4],
        "negative strides": np.ascontiguousarray(rgb[::-1, ::-1])[::-1, ::-1],
        "read-only": np.frombuffer(rgb.tobytes(), np.uint8).reshape(rgb.shape),
    }
    for array in arrays.values():
        equal(processor, array, rgb)
        equal(processor, np.moveaxis(array, -1, 0), rgb)
        if array.dtype.byteorder != ">" and min(array.strides) > 0 and array.flags.writeable:
            equal(processor, torch.from_numpy(array), rgb)
            equal(processor, torch.from_numpy(array).permute(2, 0, 1), rgb)
    grey = rgb[..., :1]
    equal(processor, grey, grey_rgb(grey[..., 0]))
    equal(processor, grey[..., 0], grey_rgb(grey[..., 0]))
    equal(processor, np.moveaxis(grey, -1, 0), grey_rgb(grey[..., 0]))
    equal(processor, rgb > 99, (rgb > 99) * np.uint8(255))
    equal(processor, torch.from_numpy(rgb).float().requires_grad_(), rgb)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 40), (40, 3), (4, 9), (40, 1)], ids=str)
def test_ambiguous_array_layouts(processor, size):
    rgb = random_rgb(*size)
    for array, channels in ((rgb, "channels_last"), (np.moveaxis(rgb, -1, 0), "channels_first")):
        equal(processor, array, rgb, input_data_format=channels)
        if array.shape[0] in (1, 3, 4) and array.shape[-1] in (1, 3, 4):
            refused(lambda array=array: pixels(processor, array), re.escape(str(array.shape)))


BAD_ARRAYS = [
    *((np.zeros(shape, np.uint8), re.escape(str(shape)), {}) for shape in [(), (5,), (0, 5), (5, 0, 3), (3, 0, 0), (9, 8, 2)]),
    *((np.zeros(shape, np.uint8), re.escape(str(shape)), {}) for shape in [(9, 8, 5), (2, 3, 4, 5, 6), (7, 8, 9)]),
    *((np.full((8, 8, 3), value), "values from", {}) for value in [-1, 65536, -0.5, float("nan"), float("inf"), 1e30]),
    *((np.full((8, 8), 0, dtype), "dtype", {}) for dtype in [np.complex64, "U3", object]),
    (torch.zeros(8, 8, 3, dtype=torch.complex64), "dtype complex64", {}),
    (np.zeros((8, 8, 3), np.uint8), "8, 8, 3", {"input_data_format": "channels_first"}),
]  # fmt: skip


@pytest.mark.parametrize(("array", "match", "options"), BAD_ARRAYS)
def test_bad_arrays(processor, array, match, options):
    refused(lambda: pixels(processor, array, **options), match)


@pytest.mark.parametrize("size", [(8000, 30), (30, 8000), (1, 201), (700, 3)])
def test_too_long_and_thin(processor, size):
    refused(lambda: pixels(processor, Image.fromarray(random_rgb(*size))), "aspect ratio must be smaller than 200")


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files(processor, tmp_path, kind):
    """Cut anywhere, or with wrong bytes: ValueError with the file's name, or what Pillow itself makes of the file."""
    if kind == "WEBP":
        pytest.importorskip("PIL._webp")
    whole = encoded(Image.fromarray(random_rgb(40, 30)), kind)
    random_state, path = random.Random(kind), tmp_path / f"damaged.{kind.lower()}"
    for attempt in range(40):
        data = bytearray(whole)
        if attempt % 2:
            del data[random_state.randrange(len(data)) :]
        else:
            for _ in range(random_state.randrange(1, 9)):
                data[random_state.randrange(min(len(data), 200))] = random_state.randrange(256)
        path.write_bytes(data)
        try:
            found = pixels(processor, path)
        except ValueError as error:
            assert path.name in str(error) or "aspect ratio" in str(error)
            continue
        with Image.open(path) as image:
            assert torch.equal(found.pixel_values, pixels(processor, image.convert("RGB")).pixel_values)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations(processor, tmp_path, orientation):
    rgb = random_rgb(40, 20)
    turns = {1: rgb, 2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1], 5: rgb.swapaxes(0, 1)}
    turns |= {6: rgb[::-1].swapaxes(0, 1), 7: rgb[::-1, ::-1].swapaxes(0, 1), 8: rgb[:, ::-1].swapaxes(0, 1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "turned.png").write_bytes(encoded(Image.fromarray(rgb), "PNG", exif=exif))
    equal(processor, tmp_path / "turned.png", np.ascontiguousarray(turns[orientation]))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF"])
def test_animated_files_are_their_first_frame(processor, tmp_path, kind):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    (tmp_path / "moving").write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    equal(processor, tmp_path / "moving", np.asarray(frames[0]))


def test_decompression_bombs(processor, tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(encoded(Image.new("1", (3000, 3000)), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    refused(lambda: pixels(processor, tmp_path / "bomb.png"), r"bomb\.png.*exceeds limit")


# Grids and prompts


def grids_of_vision(random_state):
    wrong = [[1, 4, 6], [2, 4, 4], [0, 4, 4], [-1, 4, 4], [1, -4, -4], [1, 3, 4], [1, 4, 5], [1, 2**31, 2], [2**40, 4, 4]]
    yield from ([grid] for grid in wrong)
    for _ in range(60):
        yield [[random_state.choice([-2, 0, 1, 2, 3]), *(random_state.randrange(-3, 12) for _ in "hw")] for _ in "ab"]


@pytest.mark.parametrize("patched", [False, True])
def test_grids(tiny, prompts, patched):
    inputs = prompts["one_image"]
    expected = tiny.generate(**inputs, **GREEDY)
    if patched:
        llava15_fast.patch(tiny, "torch")
    patches, random_state = inputs["pixel_values"].shape[0], random.Random(5)
    for grid in grids_of_vision(random_state):
        sizes = [t * h * w for t, h, w in grid]
        if min(min(row) for row in grid) > 0 and sum(sizes) == patches and not any(h % 2 or w % 2 for _, h, w in grid):
            continue
        bad = {**inputs, "image_grid_thw": torch.tensor(grid, device=tiny.device)}
        refused(lambda bad=bad: tiny.generate(**bad, **GREEDY), "grid_thw")
    for shape in [(3,), (0, 3), (1, 2), (1, 4), (1, 1, 3)]:
        bad = {**inputs, "image_grid_thw": torch.ones(shape, dtype=torch.long, device=tiny.device)}
        refused(lambda bad=bad: tiny(**bad), "grid_thw")
    assert torch.equal(tiny.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("patched", [False, True])
def test_prompts_with_the_wrong_number_of_placeholders(tiny, golden, patched):
    inputs = {key: value for key, value in golden["one_image"][0].items() if key not in ("labels", "attention_mask")}
    if patched:
        llava15_fast.patch(tiny, "torch")
    token, ids = tiny.config.image_token_id, inputs["input_ids"]
    right = int((ids == token).sum())
    for placeholders in [0, 1, right - 1, right + 1, 2 * right, 500]:
        prompt = torch.cat([ids[:, :1], ids.new_full((1, placeholders), token), ids[:, -1:]], -1)
        bad = {**inputs, "input_ids": prompt}
        refused(lambda bad=bad: tiny.generate(**bad, **GREEDY), f"{placeholders} image placeholder tokens")


def test_text_prompts(processor):
    image = Image.fromarray(random_rgb(40, 30))
    for images, prompts in [(1, 0), (0, 1), (2, 1), (1, 2), (3, 5), (0, 7), (1, 40)]:
        for token, kind, name in ((IMAGE, [image], "images"), (VIDEO, [[image]], "videos")):
            call = {name: kind * images or None, "text": token * prompts}
            refused(lambda call=call: processor(**call), f"{prompts} .*placeholders in the text, but {images}")


def test_non_string_prompts(processor):
    for prompt, match in [([], "empty list"), ([None], "NoneType"), ([["a"]], "list"), (3, "int"), (b"a", "bytes")]:
        refused(lambda prompt=prompt: processor(text=prompt), match)
    for image in (Image.new("RGB", (0, 5)), Image.new("L", (0, 0))):
        refused(lambda image=image: pixels(processor, image), "has no pixels")
    assert processor(images=[], text="a").keys() == processor(text="a").keys()


# What `generate` and a forward are given

TEXT = torch.arange(5, 15)[None]
POSITIONS, MASK = torch.arange(10)[None], torch.ones(1, 10, dtype=torch.long)
STRANGE_CALLS = {
    "int32 ids": lambda one: {**one, "input_ids": one["input_ids"].int()},
    "float ids": lambda one: {"input_ids": TEXT.float()},
    "ids of one axis": lambda one: {"input_ids": TEXT[0]},
    "ids of three axes": lambda one: {"input_ids": TEXT[None]},
    "no prompts": lambda one: {"input_ids": TEXT[:0]},
    "ids out of range": lambda one: {"input_ids": TEXT + 10**6},
    "negative ids": lambda one: {"input_ids": -TEXT},
    "many prompts": lambda one: {"input_ids": TEXT.repeat(130, 1)},
    "float positions": lambda one: {"input_ids": TEXT, "position_ids": POSITIONS.float() / 2},
    "int32 positions": lambda one: {"input_ids": TEXT, "position_ids": POSITIONS.int()},
    "negative positions": lambda one: {"input_ids": TEXT, "position_ids": POSITIONS - 5},
    "huge positions": lambda one: {"input_ids": TEXT, "position_ids": POSITIONS + 10**6},
    "equal positions": lambda one: {"input_ids": TEXT, "position_ids": 0 * POSITIONS},
    "too few positions": lambda one: {"input_ids": TEXT, "position_ids": POSITIONS[:, 1:]},
    "positions of one axis": lambda one: {"input_ids": TEXT, "position_ids": POSITIONS[0]},
    "bool mask": lambda one: {"input_ids": TEXT, "attention_mask": MASK.bool()},
    "float mask": lambda one: {"input_ids": TEXT, "attention_mask": MASK.float()},
    "mask of twos": lambda one: {"input_ids": TEXT, "attention_mask": 2 * MASK},
    "negative mask": lambda one: {"input_ids": TEXT, "attention_mask": -MASK},
    "mask of NaN": lambda one: {"input_ids": TEXT, "attention_mask": MASK * float("nan")},
    "mask of nothing": lambda one: {"input_ids": TEXT, "attention_mask": 0 * MASK},
    "short mask": lambda one: {"input_ids": TEXT, "attention_mask": MASK[:, 1:]},
    "mask of two rows": lambda one: {"input_ids": TEXT, "attention_mask": MASK.repeat(2, 1)},
    "mask in a list": lambda one: {"input_ids": TEXT, "attention_mask": MASK.tolist()},
    "pixels of NaN": lambda one: {**one, "pixel_values": one["pixel_values"] * float("nan")},
    "infinite pixels": lambda one: {**one, "pixel_values": one["pixel_values"] / 0},
    "double pixels": lambda one: {**one, "pixel_values": one["pixel_values"].double()},
    "integer pixels": lambda one: {**one, "pixel_values": (10 * one["pixel_values"]).long()},
    "transposed pixels": lambda one: {**one, "pixel_values": one["pixel_values"].T.contiguous().T},
    "numpy pixels": lambda one: {**one, "pixel_values": one["pixel_values"].cpu().numpy()},
    "pixels without placeholders": lambda one: {**one, "input_ids": TEXT, "attention_mask": MASK},
    "pixels without a grid": lambda one: {**one, "image_grid_thw": None},
    "a grid without pixels": lambda one: {**one, "pixel_values": None},
    "two images at one placeholder": lambda one: {
        **one, "pixel_values": one["pixel_values"].repeat(2, 1), "image_grid_thw": one["image_grid_thw"].repeat(2, 1)
    },
    "int32 grid": lambda one: {**one, "image_grid_thw": one["image_grid_thw"].int()},
    "float grid": lambda one: {**one, "image_grid_thw": one["image_grid_thw"].float()},
    "bool grid": lambda one: {**one, "image_grid_thw": one["image_grid_thw"].bool()},
    "grid in a list": lambda one: {**one, "image_grid_thw": one["image_grid_thw"].tolist()},
    "narrow embeddings": lambda one: {"inputs_embeds": torch.ones(1, 5, 7)},
    "embeddings of NaN": lambda one: {"inputs_embeds": torch.full((1, 5, 48), float("nan"))},
    "an unknown option": lambda one: {"input_ids": TEXT, "no_such_option": 3},
    "half a token": lambda one: {**one, "max_new_tokens": 2.5},
    "no token": lambda one: {**one, "max_new_tokens": 0},
    "no end": lambda one: {**one, "eos_token_id": []},
    "ends that are not in the vocabulary": lambda one: {**one, "eos_token_id": [-1, 10**7]},
    "no beams": lambda one: {**one, "num_beams": 0},
    "no temperature": lambda one: {**one, "do_sample": True, "temperature": 0.0},
    "everything suppressed": lambda one: {**one, "suppress_tokens": list(range(490))},
}  # fmt: skip


def outcome(call):
    try:
        return call()
    except Exception as error:
        return type(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an index that is out of range ends a process on a GPU")
@pytest.mark.parametrize("name", STRANGE_CALLS)
def test_unusual_calls_match_eager_or_raise(tiny, prompts, name):
    inputs = prompts["one_image"]
    call = {
        key: value.to(tiny.device) if isinstance(value, torch.Tensor) else value
        for key, value in STRANGE_CALLS[name](inputs).items()
    }
    options = {key: value for key, value in call.items() if key not in GREEDY}

    def generate():
        return tiny.generate(**{**GREEDY, **call})

    @torch.no_grad()
    def forward():
        return tiny(**options).logits

    expected = [outcome(generate), outcome(forward)]
    llava15_fast.patch(tiny, "torch")
    for (what, theirs), function in zip(zip(("ids", "logits"), expected, strict=True), (generate, forward), strict=True):
        ours = outcome(function)
        if isinstance(theirs, torch.Tensor):
            # dtypes are compared too
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4, equal_nan=True, msg=f"{what}: {ours}, {theirs}")
        else:
            assert ours is theirs, what


def test_non_tensors_are_named(tiny, golden):
    inputs = golden["one_image"][0]
    for key, value, match in [
        ("image_grid_thw", inputs["image_grid_thw"].tolist(), "grid_thw is a list, expected a tensor"),
        ("image_grid_thw", inputs["image_grid_thw"].float(), "grid_thw.*expected positive integers"),
        ("pixel_values", inputs["pixel_values"].cpu().numpy(), "pixel_values is a ndarray, expected a tensor"),
    ]:
        refused(lambda key=key, value=value: tiny(**{**inputs, key: value}), match)


# Checkpoints


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TINY, tmp_path / "model", copy_function=shutil.copyfile)
    return tmp_path / "model"


def load(folder, **options):
    return LlavaOnevision1_5ForConditionalGeneration.from_pretrained(folder, **options)


def sharded(folder, names=("a.safetensors", "b.safetensors")):
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    index = {}
    for half, name in enumerate(names):
        part = dict(tensors[half::2])
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(part, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_cut_and_wrong_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for length in [0, 4, 8, 100, len(whole) // 2, len(whole) - 1]:
        (folder / "model.safetensors").write_bytes(whole[:length])
        refused(lambda: load(folder), r"model\.safetensors is not a complete", OSError)
    (folder / "model.safetensors").write_bytes((2**63 - 1).to_bytes(8, "little") + whole[8:])
    refused(lambda: load(folder), r"model\.safetensors is not a complete", OSError)


@pytest.mark.parametrize("shape", [(3,), (1, 1), (490, 48, 2)])
def test_tensors_of_a_wrong_shape_are_named(folder, shape):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(lambda: load(folder), "mismatch", RuntimeError)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/tmp/a.safetensors", "x/../../a.safetensors", "a.safetensors/..", "..", ""]
)
def test_index_with_path_traversal(folder, name):
    sharded(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(folder / "a.safetensors", folder.parent)
    refused(lambda: load(folder), r"expected a file of the same folder|is missing", OSError)


def test_other_path_traversal(folder):
    """A subfolder, a variant, and the model that an adapter's folder names."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load(folder), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(folder.parent / "adapter")
    hostile = folder.parent / "hostile"
    shutil.copytree(folder, hostile / "sub")
    (folder.parent / "outside").mkdir()
    (hostile / "sub/model.safetensors").rename(folder.parent / "outside/model.safetensors")
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "../../outside/model.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": names})
    model_class, inside = LlavaOnevision1_5ForConditionalGeneration, "expected a file of the same folder"

    (hostile / "sub/model.safetensors.index.json").write_text(index)
    refused(lambda: model_class.from_pretrained(hostile, subfolder="sub"), inside, OSError)
    for named in (hostile / "sub", str(hostile / "sub")):
        settings = json.loads((folder.parent / "adapter/adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(named)
        (folder.parent / "adapter/adapter_config.json").write_text(json.dumps(settings))
        refused(lambda: model_class.from_pretrained(folder.parent / "adapter"), inside, OSError)
    (hostile / "sub/model.safetensors.index.json").rename(hostile / "sub/model.safetensors.index.fp16.json")
    refused(lambda: model_class.from_pretrained(hostile / "sub", variant="fp16"), inside, OSError)
    for content in ("[]", "[" * 100_000):
        (folder.parent / "adapter/adapter_config.json").write_text(content)
        refused(lambda: model_class.from_pretrained(folder.parent / "adapter"), r"adapter_config\.json", OSError)


def test_valid_variant(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert load(folder, variant="fp16").lm_head.weight.isfinite().all()


def test_code_of_a_checkpoint_never_runs(folder):
    """`trust_remote_code` or not."""
    (folder / "custom_generate").mkdir()
    code = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\ndef generate(*args, **kwargs): pass\n"
    (folder / "custom_generate/generate.py").write_text(code)
    (folder / "remote.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "remote.Config", "AutoModelForImageTextToText": "remote.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    for model_class in (LlavaOnevision1_5ForConditionalGeneration, AutoModelForImageTextToText):
        model_class.from_pretrained(folder, trust_remote_code=True)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": []}', '{"weight_map": {"x": 3}}', "[" * 100_000]
)
def test_an_unreadable_index(folder, text):
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(lambda: load(folder), r"model\.safetensors\.index\.json", OSError)


def test_a_missing_shard(folder):
    sharded(folder)
    load(folder)
    (folder / "b.safetensors").unlink()
    refused(lambda: load(folder), r"b\.safetensors is missing", OSError)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(folder, name, monkeypatch):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, folder / name)
    if "-of-" in name:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    monkeypatch.chdir(folder)
    refused(lambda: load(folder), rf"{name} is a pickle.*only safetensors", OSError)
    assert not (folder / "exploded").exists()


CONFIGS = [
    ("text_config", "num_attention_heads", 0), ("text_config", "num_attention_heads", 3), ("text_config", "hidden_size", -1),
    ("text_config", "hidden_size", "wide"), ("text_config", "vocab_size", 0), ("text_config", "num_key_value_heads", 3),
    ("text_config", "head_dim", 7), ("text_config", "num_hidden_layers", -1), ("text_config", "hidden_act", "nothing"),
    ("vision_config", "num_heads", 0), ("vision_config", "num_heads", 3), ("vision_config", "patch_size", 0),
    ("vision_config", "depth", -1), ("vision_config", "hidden_size", 1.5), ("vision_config", "spatial_merge_size", 0),
    ("vision_config", "hidden_act", "nothing"),
    ("vision_config", "depth", 20_000), ("text_config", "num_hidden_layers", 20_000),
    *(("vision_config", name, value) for name in (
        "depth", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size", "intermediate_size", "in_channels",
        "layer_norm_eps", "rope_theta", "attention_dropout",
    ) for value in ("x", None, [2])),
    ("vision_config", "layer_norm_eps", -1.0), ("vision_config", "depth", True),
]  # fmt: skip


ERRORS = (ValueError, TypeError, RuntimeError, KeyError, StrictDataclassError)


@pytest.mark.parametrize(("part", "key", "value"), CONFIGS)
def test_wrong_values_of_the_configuration(folder, part, key, value):
    config = json.loads((folder / "config.json").read_text())
    config[part][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused(lambda: load(folder), rf"{key}|'nothing'|ignore_mismatched_sizes", ERRORS)


# Interruptions, and kernels that cannot be made


def traces(model):
    return [path for path, module in model.named_modules() if RUNTIME in vars(module) or isinstance(module, FastModule)]


@pytest.mark.parametrize("step", range(4))
def test_interrupt_during_patch(tiny, prompts, monkeypatch, step):
    """At every change of a class."""
    inputs = prompts["one_image"]
    with torch.no_grad():
        expected = tiny(**inputs).logits
    left = iter(range(step))
    weights = {name: value.clone() for name, value in tiny.state_dict().items()}

    def interrupted(function):
        def call(*args, **kwargs):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(api, "_install", interrupted(api._install))
    with pytest.raises(KeyboardInterrupt):
        llava15_fast.patch(tiny, "torch")
    assert not traces(tiny)
    assert all(torch.equal(weights[name], value) for name, value in tiny.state_dict().items())
    with torch.no_grad():
        assert torch.equal(tiny(**inputs).logits, expected)
    monkeypatch.undo()
    llava15_fast.patch(tiny, "torch")


class Interrupt:
    """A trace function: KeyboardInterrupt at the `line`th line of this package that runs."""

    def __init__(self, line):
        self.line, self.passed = line, 0

    def __call__(self, frame, event, argument):
        if event == "line":
            self.passed += 1
            if self.passed == self.line:
                raise KeyboardInterrupt
        return self if "llava15_fast" in Path(frame.f_code.co_filename).parent.parts[-2:] else None


def interrupted_at(line, call):
    """Whether `call` was interrupted, and the lines that it ran."""
    tracer, before = Interrupt(line), sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    except KeyboardInterrupt:
        return True, tracer.passed
    finally:
        sys.settrace(before)
    return False, tracer.passed


@pytest.mark.parametrize("what", ["unpatch", "patch with other options"])
def test_interrupt_at_any_line_leaves_a_working_model(tiny, prompts, what):
    """Whole or half undone it answers, and `patch` and `unpatch` go on from there."""
    inputs = prompts["one_image"]
    with torch.no_grad():
        expected = tiny(**inputs).logits
    handle = llava15_fast.patch(tiny, "torch")
    parts = [row.path for row in handle.report().rows]

    def change():
        if what == "unpatch":
            llava15_fast.unpatch(tiny)
        else:
            llava15_fast.patch(tiny, "torch", cuda_graph=False)

    _, lines = interrupted_at(0, change)
    # Most lines only look through modules.
    chosen = sorted({*range(1, lines + 1, max(1, lines // 40)), *range(max(1, lines - 300), lines + 1, 7)})
    for line in chosen:
        llava15_fast.patch(tiny, "torch")
        assert interrupted_at(line, change)[0], line
        with torch.no_grad():
            torch.testing.assert_close(tiny(**inputs).logits, expected, rtol=0, atol=1e-4)
            assert [row.path for row in llava15_fast.patch(tiny, "torch").report().rows] == parts
            tiny(**inputs)
            ran = {row.path for row in handle.report().rows if row.ran}
            assert ran == {*parts} - {"generate"}, (line, ran)
        interrupted_at(line, change)
        llava15_fast.unpatch(tiny)
        assert not traces(tiny), line


@pytest.mark.parametrize("call", [0, 3, 7])
def test_interrupt_during_generate(tiny, prompts, monkeypatch, call):
    inputs = prompts["one_image"]
    expected = tiny.generate(**inputs, **GREEDY)
    handle = llava15_fast.patch(tiny, "torch")
    left, attend = iter(range(call)), unchecked("torch").flash_decode

    def interrupted(*args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return attend(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(unchecked("torch"), "flash_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(**inputs, **GREEDY)
    assert torch.equal(tiny.generate(**inputs, **GREEDY), expected) and handle.report().rows
    llava15_fast.unpatch(tiny)
    assert torch.equal(tiny.generate(**inputs, **GREEDY), expected) and not traces(tiny)


def test_failing_kernel_raises(tiny, prompts, monkeypatch):
    """Nothing runs on half the kernels: what the compiler says comes out, and the next call, or `unpatch`, is right."""
    inputs = prompts["one_image"]
    with torch.no_grad():
        expected = tiny(**inputs).logits
        llava15_fast.patch(tiny, "torch")

        def fails(*args, **kwargs):
            raise RuntimeError("PTX assembly aborted due to errors")

        with monkeypatch.context() as patched:
            patched.setattr(unchecked("torch"), "rms_norm", fails)
            with pytest.raises(RuntimeError, match="PTX assembly aborted"):
                tiny(**inputs)
        torch.testing.assert_close(tiny(**inputs).logits, expected, rtol=0, atol=1e-4)
        llava15_fast.unpatch(tiny)
        assert torch.equal(tiny(**inputs).logits, expected)


@pytest.mark.parametrize(
    "error",
    [OutOfResources(300_000, 232_448, "shared memory"), PTXASError("ptxas fatal: no such target"), OSError("read-only cache")],
    ids=lambda error: type(error).__name__,
)
def test_compile_error_names_the_kernel(tiny, prompts, monkeypatch, error):
    """With what Triton says, and what to do; the next call is right."""
    prompt = prompts["text"]
    expected = tiny.generate(**prompt, **GREEDY)
    llava15_fast.patch(tiny, "triton")

    class Broken:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                raise error

            return launch

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["llava15_kernels.qk_norm_rope"], "_qk_norm_rope_kernel", Broken())
        said = re.escape(str(error).splitlines()[-1])
        with pytest.raises(RuntimeError, match=rf'qk_norm_rope: .*{said}.*backend="torch" runs without it'):
            tiny.generate(**prompt, **GREEDY)
    llava15_fast.patch(tiny, "torch")
    assert torch.equal(tiny.generate(**prompt, **GREEDY), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs a cache to compile into")
def test_an_unwritable_kernel_cache(tmp_path):
    """Without a GPU nothing is compiled, and nothing is written."""
    (tmp_path / "file").touch()
    code = f"""
import os; os.environ["TRITON_CACHE_DIR"] = {str(tmp_path / "file" / "cache")!r}
import torch, llava15_fast
model = llava15_fast.LlavaOnevision1_5ForConditionalGeneration.from_pretrained({str(TINY)!r}).eval()
ids = torch.arange(5, 12)[None]
expected = model.generate(ids, max_new_tokens=3, do_sample=False)
llava15_fast.patch(model)
assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"})


def test_unwritable_cache_error_message(tmp_path):
    """A GPU's first call, without one: Triton's error names the folder, as `llava15-fast env` does."""
    (tmp_path / "file").touch()
    (tmp_path / "program.py").write_text("""
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def kernel(x):
    tl.store(x, 1.0)

triton.compile(ASTSource(kernel, {"x": "*fp32"}), target=GPUTarget("cuda", 90, 32))
""")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "file" / "cache")
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and f"Error: [Errno 20] Not a directory: '{tmp_path}/file/cache" in done.stderr, done.stderr
