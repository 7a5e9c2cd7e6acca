"""The processor: text, images and video frames -> model inputs, with Pillow alone.

    "... <|image_pad|> ..."  +  image     ->  input_ids with one placeholder per merged patch, pixel_values, image_grid_thw
    "... <|video_pad|> ..."  +  frames    ->  the same as pixel_values_videos, video_grid_thw (frames, h, w)

Options, placeholders, masks and loading follow transformers' Qwen2-VL processor, which this class extends. Images go through
its Pillow image processor with `temporal_patch_size=1`. Its video processor needs torchvision, so videos are passed as frames:
a list of images or an array (frames, height, width, 3).
"""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoTokenizer
from transformers.image_utils import httpx  # or httpx2, which newer releases bring under that name
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.processing_utils import MultiModalData, ProcessingKwargs, VideosKwargs

from .releases import ADJUSTS_MASKS, SANITIZES

Array = np.ndarray | torch.Tensor
ImageSource = str | PathLike | Image.Image | Array

FORMATS = ["AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
"""Allowed image formats; some others that Pillow and its plugins read start programs (EPS: Ghostscript)."""

SECONDS, BYTES = 15, 2**28
"""Limits on downloading an image from a URL."""


def read_image(source: ImageSource, channels: str | None = None, highest: float | None = None) -> Image.Image:
    """An upright 8-bit RGB image, composited on white, from a path, a URL, base64 text, a Pillow image, or an array.

    Args:
        source: arrays are (h, w), (h, w, c) or (c, h, w) with one, three or four channels. Booleans are black and white;
            floats up to 1 are in the range 0 to 1, other values in 0 to 255, or 0 to 65535 if one is above 255.
        channels: "channels_first" or "channels_last", for arrays whose shape is ambiguous.
        highest: the maximum over all frames of a video, so that dark and bright frames are scaled alike.

    Raises:
        ValueError: the image cannot be read; the message is one line that names it.
    """
    if isinstance(source, Array):
        array = _to_8_bit(_channels_last(source, channels), highest)
        source = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
    if not isinstance(source, (str, PathLike, Image.Image)):
        raise ValueError(f"an image is given as {type(source).__name__}, expected a path, address, Pillow image or array")
    name = f"of mode {source.mode}, size {source.size}" if isinstance(source, Image.Image) else _short(repr(str(source)))
    if isinstance(source, Image.Image) and 0 in source.size:
        raise ValueError(f"an image {name} has no pixels")
    try:
        image = source if isinstance(source, Image.Image) else _open(source)
        if image.format not in (None, *FORMATS):
            raise UnidentifiedImageError
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            # Pillow's conversion clips 16-bit values at 255, which turns most such images white.
            values, transparent = np.asarray(image), image.info.get("transparency")
            image = Image.fromarray(_to_8_bit(values))
            if transparent is not None:
                image.putalpha(Image.fromarray(values != transparent).convert("L"))
        if image.has_transparency_data:
            image = image.convert("LA") if image.mode == "La" else image  # the only mode that does not convert to RGBA
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no image file {name}") from None
    except UnidentifiedImageError:
        raise ValueError(f"cannot read image {name}: not an image of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders let anything out: OSError, SyntaxError, struct.error, IndexError, ...
        raise ValueError(f"cannot read image {name}: {_short(str(error) or type(error).__name__)}") from None


def _short(text: str) -> str:
    """One line of at most 300 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:100]}...{line[-180:]}"


def _open(source: str | PathLike) -> Image.Image:
    text = source if isinstance(source, str) else ""
    file: Any = Path(source)
    is_base64 = len(text) > 64 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text) and not Path(text[:255]).exists()
    if text.startswith(("http://", "https://")):
        file = io.BytesIO(_fetch(text))
    elif text.startswith("data:image/") or is_base64:
        file = io.BytesIO(base64.b64decode(text.rpartition(",")[2]))
    elif file.exists() and not file.is_file():
        raise OSError("not a regular file")  # reading from a pipe or a device may block for ever
    Image.init()
    return Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN])


def _fetch(address: str) -> bytes:
    data, end = bytearray(), time.monotonic() + SECONDS
    with httpx.stream("GET", address, timeout=SECONDS, follow_redirects=True) as answer:
        answer.raise_for_status()
        for part in answer.iter_bytes():
            data += part
            if len(data) > BYTES or time.monotonic() > end:
                raise OSError(f"more than {SECONDS} seconds or {BYTES} bytes")
    return bytes(data)


def _channels_last(array: Array, channels: str | None) -> np.ndarray:
    """(h, w) or (h, w, c)."""
    if isinstance(array, torch.Tensor):
        try:
            wide = torch.float32 if array.dtype.itemsize < 4 and array.is_floating_point() else array.dtype
            array = array.detach().to("cpu", wide).numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            described = f"{array.dtype}, {array.layout}, on {array.device}"
            raise ValueError(f"cannot read an image tensor ({described}): {_short(str(error))}") from None
    counts, shape = (1, 3, 4), array.shape
    if 0 in shape:
        raise ValueError(f"an image array of shape {shape} has no pixels")
    first, last = array.ndim == 3 and shape[0] in counts, array.ndim == 3 and shape[-1] in counts
    if first and last and channels is None:
        which = "input_data_format='channels_first' or 'channels_last'"
        raise ValueError(f"an image array of shape {shape} may have its channels first or last: say {which}")
    if array.ndim == 3 and (first if channels is None else str(channels).endswith("first")):
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in counts):
        raise ValueError(f"an image array has shape {shape}, expected (h, w), (h, w, c) or (c, h, w) with c 1, 3 or 4")
    return array


def _to_8_bit(values: np.ndarray, highest: float | None = None) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"an image array has dtype {values.dtype}, expected booleans, integers or floats")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):  # nor NaN
        raise ValueError(f"an image array has values from {low} to {high}, expected 0 to 1, to 255 or to 65535")
    high = high if highest is None else max(high, highest)
    scale = 65535.0 if high > 255 else 1.0 if high <= 1 and values.dtype.kind == "f" else 255.0
    return (values.astype(np.float64) * (255.0 / scale)).round().astype(np.uint8)


def _pixels(source: ImageSource, options: dict[str, Any], highest: float | None = None) -> np.ndarray:
    """(c, h, w) for the image processor: 8-bit, except that arrays resized or rescaled by the caller keep their values."""
    channels = options.get("input_data_format")
    done = options.get("do_resize") is False or options.get("do_rescale") is False
    if done and isinstance(source, Array) and source.ndim == 3:
        return np.moveaxis(_channels_last(source, channels), -1, 0)
    return np.moveaxis(np.asarray(read_image(source, channels, highest)), -1, 0)


def _frames(frames: Iterable[Any], options: dict[str, Any]) -> list[np.ndarray]:
    frames, plain = list(frames), (np.uint8, np.bool_, torch.uint8, torch.bool)
    arrays = [x for x in frames if isinstance(x, Array) and 0 not in x.shape and x.dtype not in plain]
    highest = max((float(x.max()) for x in arrays if not (isinstance(x, torch.Tensor) and x.is_meta)), default=None)
    if not frames:
        raise ValueError("a video has no frames, expected at least one")
    try:
        return [_pixels(frame, options, highest) for frame in frames]
    except ValueError as error:
        raise ValueError(f"{error}; a video is given as its frames, a file has to be decoded first") from None


def _is_image(item: Any) -> bool:
    """Whether `item` is one image, not several."""
    return not isinstance(item, (list, tuple)) and getattr(item, "ndim", 3) != 4


def _is_video(item: Any) -> bool:
    """Whether `item` is one video, an array of frames or a list of frames, not several."""
    if isinstance(item, (list, tuple)):
        return len(item) > 0 and all(isinstance(x, (str, PathLike, Image.Image)) or getattr(x, "ndim", 0) == 3 for x in item)
    if isinstance(item, (str, PathLike)):
        raise ValueError(f"video {_short(repr(str(item)))}: decode it first and pass its frames, a list of images or an array")
    if getattr(item, "ndim", 0) not in (4, 5):
        raise ValueError(f"a video is given as {type(item).__name__}, expected a list of frames or an array (frames, h, w, 3)")
    return item.ndim == 4


def _groups(items: Any, is_one: Callable[[Any], bool], read: Callable[[Any], Any]) -> list[list[Any]] | None:
    """The items read: one list per prompt if `items` is a list of lists, otherwise a single list; None if there are none."""

    def flat(items: Any) -> list[Any]:
        return [read(items)] if is_one(items) else [one for item in items for one in flat(item)]

    nested = isinstance(items, (list, tuple)) and all(isinstance(own, (list, tuple)) and not is_one(own) for own in items)
    groups = [] if items is None else [flat(own) for own in (items if nested else [items])]
    return groups if any(groups) else None


class LlavaOnevision1_5Processor(Qwen2VLProcessor):
    """Tokenizer and Pillow image processor.

    Called with `text`, one prompt or a list, and `images` and `videos`, one, a list, or a list per prompt: images are paths,
    URLs, base64 text, Pillow images or arrays; videos are lists of these or arrays of frames. Options are the tokenizer's and
    the image processor's, flat or in `text_kwargs`, `images_kwargs` and `videos_kwargs`. The padding side is the tokenizer's,
    which `from_pretrained` sets to left. Raises ValueError if images cannot be read or do not match the text.

    Args:
        image_processor: a `Qwen2VLImageProcessorPil` with `temporal_patch_size` 1.
        tokenizer: the Qwen2 tokenizer, with `<|image_pad|>` and `<|video_pad|>` as single tokens.
        chat_template: Jinja template; by default the tokenizer's.
    """

    valid_processor_kwargs = ProcessingKwargs
    video_processor = property(lambda self: self.image_processor)  # frames are images
    return_mm_token_type_ids = False  # only on request: the model has 1D positions and does not need them

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        if image_processor is None or tokenizer is None:
            raise ValueError("the processor needs an image_processor and a tokenizer")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        if image_processor.temporal_patch_size != 1:
            raise ValueError(f"temporal_patch_size of the image processor is {image_processor.temporal_patch_size}, expected 1")

    @classmethod
    def _get_arguments_from_pretrained(cls, name_or_path: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        """The image processor, with `min_pixels` and `max_pixels` applied, and the tokenizer, unless they are given.

        The classes are fixed, whatever the files name (the published ones name Qwen2.5-VL's), and no code from files runs.
        """
        image_processor, tokenizer = kwargs.pop("image_processor", None), kwargs.pop("tokenizer", None)
        pixels = {key: kwargs.pop(key) for key in ("min_pixels", "max_pixels") if key in kwargs}
        for key in ("config", "trust_remote_code", "use_fast", "_from_auto", "chat_template"):
            kwargs.pop(key, None)
        if image_processor is None:
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(name_or_path, **kwargs)
            # The published files may omit this, and the class defaults to Qwen2-VL's 2.
            image_processor.temporal_patch_size = 1
            image_processor.size = _pixel_limits(image_processor.size, **pixels)
        elif pixels:
            raise ValueError(f"{', '.join(pixels)} beside an image_processor: set the limits there")
        if tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **kwargs)
            except Exception as error:  # the tokenizers library raises bare ones, without a file's name
                raise ValueError(f"cannot load the tokenizer of {name_or_path}: {error}") from error
            # As `generate` needs it; the user's choice, here or later on the tokenizer, takes precedence.
            tokenizer.padding_side = kwargs.get("padding_side", "left")
        return [image_processor, tokenizer]

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> Any:
        """Refuses audio tokenizers: files may name any class of transformers as one, which could load anything."""
        if module_name not in ("ImageProcessingMixin", "PreTrainedTokenizerBase", "MistralCommonBackend"):
            raise ValueError(f"the processor's files name the audio tokenizer {module_name}: this model does not support audio")
        return Qwen2VLProcessor.get_possibly_dynamic_module(module_name)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> tuple:
        """Prompts as a list, images as lists of arrays (c, h, w), videos as lists of lists of arrays."""
        common = {**kwargs.get("common_kwargs", {}), **kwargs}
        image_options, video_options = ({**common, **kwargs.get(name, {})} for name in ("images_kwargs", "videos_kwargs"))
        images = _groups(images, _is_image, lambda image: _pixels(image, image_options))
        videos = _groups(videos, _is_video, lambda frames: _frames(frames, video_options))
        return images, None if text is None else _prompts(text), videos, kwargs.get("audio")

    def validate_inputs(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> None:
        """Raises ValueError if the numbers of images or videos and of placeholders differ, in total or per prompt."""
        if kwargs.get("audio") is not None:
            raise ValueError("this model does not support audio")
        if images is None and text is None and videos is None:
            raise ValueError("pass at least one of text, images and videos")
        for kind, token, groups in (("images", self.image_token, images), ("videos", self.video_token, videos)):
            counts = [len(group) for group in groups or []]
            found = [prompt.count(token) for prompt in text or []]
            if text is not None and sum(found) != sum(counts):
                raise ValueError(f"{sum(found)} {token} placeholders in the text, but {sum(counts)} {kind} were passed")
            if text is not None and len(counts) > 1 and counts != found:
                raise ValueError(f"{kind} per prompt are {counts}, but the prompts have {found} {token} placeholders")
            if counts and kwargs.get("return_offsets_mapping") and not ADJUSTS_MASKS:
                raise ValueError(f"return_assistant_tokens_mask with {kind} needs a newer transformers")
        if kwargs.get("sanitize_control_tokens") and not SANITIZES:
            raise ValueError("sanitize_control_tokens needs a newer transformers")

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, dict]:
        """As transformers', with pixel limits merged into `size`; ValueError for settings the model was not trained with."""
        try:
            merged = super()._merge_kwargs(*args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(_short(str(error))) from None
        images, videos = merged["images_kwargs"], merged["videos_kwargs"]
        for options in (images, videos):
            for name in ("patch_size", "merge_size", "temporal_patch_size"):
                if options.get(name, (fixed := getattr(self.image_processor, name))) != fixed:
                    raise ValueError(f"{name} {options[name]!r}: expected {fixed}, which the model was trained with")
            pixels = {key: options.pop(key) for key in ("min_pixels", "max_pixels") if key in options}
            options["size"] = _pixel_limits(options.get("size") or self.image_processor.size, **pixels)
            options["input_data_format"] = "channels_first"
        return merged

    def _process_images(self, images: list[list[np.ndarray]], **options: Any) -> tuple[Any, list[str]]:
        return super()._process_images([image for group in images for image in group], **options)

    def _process_videos(self, videos: list[list[list[np.ndarray]]], **options: Any) -> tuple[Any, list[str]]:
        for name in VideosKwargs.__annotations__.keys() - self.image_processor.valid_kwargs.__annotations__.keys():
            if (given := options.pop(name, None)) and name in ("fps", "num_frames", "do_sample_frames"):
                raise ValueError(f"{name} is {given!r}: a video is given as its frames, of which all are taken")
        clips = [self.image_processor(one, **{**options, "return_tensors": "np"}) for group in videos for one in group]
        grids = np.array([[len(clip["image_grid_thw"]), *clip["image_grid_thw"][0, 1:]] for clip in clips])
        for clip, grid in zip(clips, grids, strict=True):
            if (clip["image_grid_thw"][:, 1:] != grid[1:]).any():
                raise ValueError(f"the frames of a video have different sizes: grids {clip['image_grid_thw'].tolist()}")
        data = {"pixel_values_videos": np.concatenate([clip["pixel_values"] for clip in clips]), "video_grid_thw": grids}
        return data, [self.replace_video_token(data, index) for index in range(len(grids))]

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Numbers of placeholders for images (height, width) and videos (frames, height, width), under the call's options."""
        merged, merge = self._merge_kwargs(self.valid_processor_kwargs, **kwargs), self.image_processor.merge_size**2

        def patches(kind: str, height: int, width: int) -> int:
            if merged[kind].get("do_resize") is False:
                raise ValueError("do_resize is False: the size of the model input is not known in advance")
            size = merged[kind]["size"]
            limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
            return self.image_processor.get_number_of_image_patches(height, width, limits)

        found: dict[str, list[int]] = {}
        if image_sizes is not None:
            found["num_image_patches"] = [patches("images_kwargs", *size) for size in image_sizes]
            found["num_image_tokens"] = [count // merge for count in found["num_image_patches"]]
        if video_sizes is not None:
            found["num_video_tokens"] = [t * patches("videos_kwargs", *size) // merge for t, *size in video_sizes]
        return MultiModalData(**found)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "pixel_values_videos", "video_grid_thw"]


def _pixel_limits(size: Any, min_pixels: float | None = None, max_pixels: float | None = None) -> dict[str, int]:
    """The image processor's `size` with a call's limits; a limit beyond the other, configured one moves that along."""
    try:
        low = size["shortest_edge"] if min_pixels is None else min_pixels
        high = size["longest_edge"] if max_pixels is None else max_pixels
        low = low if min_pixels is not None else min(low, high)
        high = high if max_pixels is not None else max(low, high)
    except (KeyError, TypeError):
        given = f"size {size!r}, min_pixels {min_pixels!r}, max_pixels {max_pixels!r}"
        raise ValueError(f"{given}: expected numbers of pixels, shortest_edge and longest_edge in a size") from None
    if not 0 < low <= high:
        raise ValueError(f"min_pixels {low} and max_pixels {high}: expected 0 < min <= max")
    if Image.MAX_IMAGE_PIXELS is not None and low > 2 * Image.MAX_IMAGE_PIXELS:
        # Every image would be enlarged to a size that Pillow considers a decompression bomb.
        raise ValueError(f"min_pixels {low} is more than Pillow's limit of {2 * Image.MAX_IMAGE_PIXELS}")
    return {"shortest_edge": low, "longest_edge": high}


def _prompts(text: Any) -> list[str]:
    prompts = list(text) if isinstance(text, Iterable) and not isinstance(text, (str, bytes)) else [text]
    if not prompts:
        raise ValueError("text is an empty list, expected at least one prompt")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is given as {type(prompt).__name__}, expected a string or a list of strings")
        if lone := re.search("[\ud800-\udfff]", prompt):
            raise ValueError(f"a prompt holds {lone[0]!r} at position {lone.start()}, which is not valid UTF-8")
    return prompts
