"""The processor: text, images and video frames -> model inputs, with Pillow alone.

    "... <|image_pad|> ..."  +  image     ->  input_ids with one placeholder per merged patch, pixel_values, image_grid_thw
    "... <|video_pad|> ..."  +  frames    ->  the same as pixel_values_videos, video_grid_thw (frames, h, w)

Images go through transformers' Pillow processor of Qwen2-VL with `temporal_patch_size=1`. transformers' own video
processor needs torchvision, so a video is taken as its frames: a list of images or an array (frames, height, width, 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorKwargs,
    Qwen2VLImageProcessorPil,
)

ImageSource = str | PathLike | Image.Image | np.ndarray | torch.Tensor

IMAGE_OPTIONS = frozenset(Qwen2VLImageProcessorKwargs.__annotations__) - {"return_tensors"}
"""Options of a call that go to the image processor; every other one goes to the tokenizer."""


def read_image(source: ImageSource, channels: str | None = None, highest: float | None = None) -> Image.Image:
    """An upright 8-bit RGB image of a path, an address, base64 text, a Pillow image, or an array.

    Args:
        source: arrays are (h, w), (h, w, c) or (c, h, w) with one, three or four channels. Booleans are black and white;
            floats up to 1 count from 0 to 1, other values from 0 to 255, or to 65535 if one is above 255. Transparency is
            dropped.
        channels: "channels_first" or "channels_last", for an array whose shape does not tell.
        highest: of all frames, where the array is one of a video: a dark frame counts as the bright ones do.

    Raises:
        ValueError: the image cannot be read; the message names it.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        source = _from_array(source, channels, highest)
    if not isinstance(source, (str, PathLike, Image.Image)):
        raise ValueError(
            f"an image is given as {type(source).__name__}, expected a path, an address, a Pillow image or an array"
        )
    name = repr(str(source)[:200]) if not isinstance(source, Image.Image) else f"of mode {source.mode}, size {source.size}"
    if isinstance(source, Image.Image) and 0 in source.size:
        raise ValueError(f"an image {name} holds no pixels")
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, str) and (source.startswith(("http://", "https://", "data:image/")) or _is_base64(source)):
            image = load_image(source)
        else:
            image = Image.open(source)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            # Pillow's own conversion clips 16-bit values at 255, which turns most such images white.
            image = Image.fromarray(_to_8_bit(np.asarray(image)))
        image = image.convert("RGB")
        image.info.pop("transparency", None)  # transformers would paint that colour white
        return image
    except FileNotFoundError:
        raise ValueError(f"no image file {name}") from None
    except UnidentifiedImageError:
        raise ValueError(f"cannot read image {name}: not an image that Pillow knows") from None
    except Exception as error:  # Pillow's decoders let anything out: OSError, SyntaxError, struct.error, IndexError, ...
        raise ValueError(f"cannot read image {name}: {error}") from None


def _is_base64(text: str) -> bool:
    return len(text) > 64 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text) is not None and not Path(text[:255]).exists()


def _from_array(array: np.ndarray | torch.Tensor, channels: str | None, highest: float | None) -> Image.Image:
    if isinstance(array, torch.Tensor):
        try:
            wide = torch.float32 if array.dtype.itemsize < 4 and array.is_floating_point() else array.dtype
            array = array.detach().to("cpu", wide).numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            described = f"{array.dtype}, {array.layout}, on {array.device}"
            raise ValueError(f"cannot read an image tensor ({described}): {str(error).splitlines()[0]}") from None
    if 0 in array.shape:
        raise ValueError(f"an image array of shape {array.shape} holds no pixels")
    counts, shape = (1, 3, 4), array.shape
    first, last = array.ndim == 3 and array.shape[0] in counts, array.ndim == 3 and array.shape[-1] in counts
    if first and last and channels is None:
        raise ValueError(
            f"an image array of shape {array.shape} may have its channels first or last: say which, "
            "input_data_format='channels_first' or 'channels_last'"
        )
    if array.ndim == 3 and (first if channels is None else str(channels).endswith("first")):
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in counts):
        raise ValueError(f"an image array has shape {shape}, expected (h, w), (h, w, c) or (c, h, w) with c 1, 3 or 4")
    array = _to_8_bit(array, highest)
    if array.ndim == 3:
        array = array[..., 0] if array.shape[-1] == 1 else array[..., :3]
    return Image.fromarray(array)


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


def _prepare(
    source: ImageSource, options: dict[str, Any], highest: float | None = None
) -> Image.Image | np.ndarray | torch.Tensor:
    """What goes to the image processor: an 8-bit image, but an array whose caller has resized or rescaled it goes as it is."""
    done = options.get("do_resize") is False or options.get("do_rescale") is False
    if done and isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 3 and 0 not in source.shape:
        return source
    return read_image(source, options.get("input_data_format"), highest)


def _highest(frames: list[Any]) -> float | None:
    """The largest value in all frames that are arrays of other than 8-bit numbers."""
    plain = (np.uint8, np.bool_, torch.uint8, torch.bool)
    arrays = [x for x in frames if isinstance(x, (np.ndarray, torch.Tensor)) and 0 not in x.shape and x.dtype not in plain]
    return max((float(x.max()) for x in arrays if not (isinstance(x, torch.Tensor) and x.is_meta)), default=None)


def _without_format(options: dict[str, Any], image: Any) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "input_data_format"} if isinstance(image, Image.Image) else options


def _flatten(items: Any) -> Iterator[Any]:
    """The images of an image, a list, a list of lists, or an array of images, in order."""
    if isinstance(items, (list, tuple)) or (isinstance(items, (np.ndarray, torch.Tensor)) and items.ndim == 4):
        for item in items:
            yield from _flatten(item)
    else:
        yield items


def _is_video(item: Any) -> bool:
    """Whether `item` is one video: an array of frames, or a list of frames."""
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return item.ndim == 4
    return isinstance(item, (list, tuple)) and len(item) > 0 and all(_is_frame(frame) for frame in item)


def _is_frame(item: Any) -> bool:
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return item.ndim == 3
    return isinstance(item, (str, PathLike, Image.Image))


def _videos(items: Any) -> Iterator[list[Any]]:
    """Every video of a video, a list of videos, or a list of lists of videos, as its list of frames."""
    if _is_video(items):
        yield list(items)
    elif isinstance(items, (list, tuple)) and items:
        for item in items:
            yield from _videos(item)
    elif isinstance(items, (str, PathLike)):
        raise ValueError(f"video {str(items)!r}: decode it first and pass its frames, a list of images or an array")
    elif not isinstance(items, (list, tuple)):
        raise ValueError(f"a video is given as {type(items).__name__}, expected a list of frames or an array (frames, h, w, 3)")


class LlavaOnevision1_5Processor(ProcessorMixin):
    """Tokenizer and Pillow image processor in one.

    Args:
        image_processor: a `Qwen2VLImageProcessorPil` with `temporal_patch_size` 1.
        tokenizer: the Qwen2 tokenizer, with `<|image_pad|>` and `<|video_pad|>` as single tokens.
        chat_template: Jinja template; by default the tokenizer's.
    """

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
    ) -> None:
        if image_processor is None or tokenizer is None:
            raise ValueError("the processor needs an image_processor and a tokenizer")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        if image_processor.temporal_patch_size != 1:
            raise ValueError(f"temporal_patch_size of the image processor is {image_processor.temporal_patch_size}, expected 1")
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> LlavaOnevision1_5Processor:
        """From a folder or repository; `min_pixels` and `max_pixels` override the image processor's.

        The processor class that the files name (the published ones name Qwen2.5-VL's) is not looked at.
        """
        pixels = {key: kwargs.pop(key) for key in ("min_pixels", "max_pixels") if key in kwargs}
        # Options for choosing classes: here they are fixed.
        for key in ("config", "trust_remote_code", "use_fast", "_from_auto"):
            kwargs.pop(key, None)
        processor_dict, kwargs = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # The published files may leave this to the class, whose default is Qwen2-VL's 2.
        image_processor.temporal_patch_size = 1
        image_processor.size = _pixel_limits(image_processor.size, pixels)
        try:
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except Exception as error:  # the tokenizers library raises bare ones, without a file's name
            raise ValueError(f"cannot load the tokenizer of {pretrained_model_name_or_path}: {error}") from error
        # What `generate` needs; a user's choice, here or later on the tokenizer, counts.
        tokenizer.padding_side = kwargs.get("padding_side", "left")
        return cls(image_processor, tokenizer, chat_template=processor_dict.get("chat_template"))

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: one image, a list, or a list per prompt: paths, addresses, Pillow images, arrays.
            text: one prompt or a list, with one `<|image_pad|>` per image and one `<|video_pad|>` per video.
            videos: one video, a list, or a list per prompt; a video is a list of frames or an array of them.
            **kwargs: the tokenizer's options (`padding`, `return_tensors`, ...) and the image processor's
                (`min_pixels`, `max_pixels`, `size`, ...), also inside `text_kwargs`, `images_kwargs`, `videos_kwargs`.
                Padding is on the side that the tokenizer says, which `from_pretrained` sets to the left.

        Returns:
            `input_ids`, `attention_mask`, and `pixel_values`, `image_grid_thw`, `pixel_values_videos`, `video_grid_thw` where
            there are images or videos.

        Raises:
            ValueError: an image cannot be read, or placeholders and images do not match in number.
        """
        if audio is not None:
            raise ValueError("this model takes no audio")
        image_options, video_options, text_options = _split_options(kwargs)
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            for options in (image_options, video_options):
                if options.get(name, (fixed := getattr(self.image_processor, name))) != fixed:
                    raise ValueError(f"{name} {options[name]!r}: expected {fixed}, which the model was trained with")
        data: dict[str, Any] = {}
        image_tokens: list[int] = []
        video_tokens: list[int] = []
        if images is not None and (flat := [_prepare(image, image_options) for image in _flatten(images)]):
            data["pixel_values"], data["image_grid_thw"] = self._patches(flat, image_options)
            image_tokens = self._merged_tokens(data["image_grid_thw"])
        if videos is not None and (clips := list(_videos(videos))):
            patches, grids = zip(*(self._video_patches(clip, video_options) for clip in clips), strict=True)
            data["pixel_values_videos"], data["video_grid_thw"] = np.concatenate(patches), np.stack(grids)
            video_tokens = self._merged_tokens(data["video_grid_thw"])
        return_tensors = text_options.get("return_tensors")
        if text is not None:
            prompts = [text] if isinstance(text, str) else _prompts(text)
            _check_per_prompt(prompts, self.image_token, images, "images")
            if not _is_video(videos):
                _check_per_prompt(prompts, self.video_token, videos, "videos")
            prompts = self._expand(prompts, self.image_token, image_tokens, "image")
            prompts = self._expand(prompts, self.video_token, video_tokens, "video")
            data = {**self.tokenizer(prompts, **text_options), **data}
        elif not data:
            raise ValueError("pass at least one of text, images and videos")
        return BatchFeature(data, tensor_type=return_tensors)

    def _patches(self, images: list[Any], options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        if "min_pixels" in options or "max_pixels" in options:
            limits = _pixel_limits(options.get("size") or self.image_processor.size, options)
            options = {key: value for key, value in options.items() if key not in ("min_pixels", "max_pixels")}
            options["size"] = limits
        # One call per image: the arrays of one call must agree in where their channels are, files need not.
        # Where an array's channels are is known by now, unless it goes on as it is.
        features = [self.image_processor(image, return_tensors="np", **_without_format(options, image)) for image in images]
        return (
            np.concatenate([feature["pixel_values"] for feature in features]),
            np.concatenate([feature["image_grid_thw"] for feature in features]),
        )

    def _video_patches(self, frames: list[Any], options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        if not frames:
            raise ValueError("a video has no frames, expected at least one")
        try:
            images = [_prepare(frame, options, _highest(frames)) for frame in frames]
        except ValueError as error:
            raise ValueError(f"{error}; a video is given as its frames, a file has to be decoded first") from None
        patches, grids = self._patches(images, options)
        if (grids != grids[0]).any():
            raise ValueError(f"the frames of a video have different sizes: grids {grids[:, 1:].tolist()}")
        return patches, np.array([len(frames), *grids[0, 1:]])

    def _merged_tokens(self, grids: np.ndarray) -> list[int]:
        return (grids.prod(-1) // self.image_processor.merge_size**2).tolist()

    @staticmethod
    def _expand(prompts: list[str], token: str, counts: list[int], kind: str) -> list[str]:
        """Each placeholder repeated as often as its image or video has features."""
        found = sum(prompt.count(token) for prompt in prompts)
        if found != len(counts):
            raise ValueError(f"{found} {token} placeholders in the text, but {len(counts)} {kind}s were passed")
        remaining = iter(counts)
        expanded = []
        for prompt in prompts:
            first, *rest = prompt.split(token)
            expanded.append(first + "".join(token * next(remaining) + part for part in rest))
        return expanded

    @property
    def model_input_names(self) -> list[str]:
        names = self.tokenizer.model_input_names + self.image_processor.model_input_names
        return [*dict.fromkeys(names), "pixel_values_videos", "video_grid_thw"]


def _pixel_limits(size: Any, options: dict[str, Any]) -> dict[str, int]:
    """The image processor's `size` with `min_pixels` / `max_pixels` of `options` put in."""
    for name in ("min_pixels", "max_pixels"):
        if isinstance(value := options.get(name), bool) or not isinstance(value, (int, float, np.number, type(None))):
            raise ValueError(f"{name} is {value!r}, expected a number of pixels")
    limits = {"shortest_edge": size["shortest_edge"], "longest_edge": size["longest_edge"]}
    if options.get("min_pixels") is not None:
        limits["shortest_edge"] = options["min_pixels"]
    if options.get("max_pixels") is not None:
        limits["longest_edge"] = options["max_pixels"]
    # A limit of the call that passes the configured other one takes it along.
    if options.get("min_pixels") is None:
        limits["shortest_edge"] = min(limits.values())
    if options.get("max_pixels") is None:
        limits["longest_edge"] = max(limits.values())
    if not 0 < limits["shortest_edge"] <= limits["longest_edge"]:
        raise ValueError(
            f"min_pixels {limits['shortest_edge']} and max_pixels {limits['longest_edge']}: expected 0 < min <= max"
        )
    if Image.MAX_IMAGE_PIXELS is not None and limits["shortest_edge"] > 2 * Image.MAX_IMAGE_PIXELS:
        # What Pillow takes for an attack in a file, every picture would be enlarged to.
        raise ValueError(f"min_pixels {limits['shortest_edge']} is more than Pillow's limit of {2 * Image.MAX_IMAGE_PIXELS}")
    return limits


def _prompts(text: Any) -> list[str]:
    prompts = list(text) if isinstance(text, Iterable) and not isinstance(text, bytes) else [text]
    if strange := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ValueError(f"a prompt is given as {type(strange[0]).__name__}, expected a string or a list of strings")
    if not prompts:
        raise ValueError("text is an empty list, expected at least one prompt")
    return prompts


def _check_per_prompt(prompts: list[str], token: str, items: Any, kind: str) -> None:
    """A list of lists is one list per prompt."""
    if not isinstance(items, (list, tuple)) or not items or not all(isinstance(own, (list, tuple)) for own in items):
        return
    if kind == "videos" and any(_is_video(own) for own in items):  # lists of frames
        return
    counts = [len(list((_videos if kind == "videos" else _flatten)(own))) for own in items]
    found = [prompt.count(token) for prompt in prompts]
    if counts != found:
        raise ValueError(f"{kind} per prompt are {counts}, but the prompts have {found} {token} placeholders")


def _split_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Options of the call -> those for images, for videos, for the tokenizer."""
    kwargs = dict(kwargs)
    common = kwargs.pop("common_kwargs", {})
    images, videos, text = (dict(kwargs.pop(f"{kind}_kwargs", {})) for kind in ("images", "videos", "text"))
    for key, value in {**common, **kwargs}.items():
        for options in _owners(key, images, videos, text):
            options[key] = value
    return images, videos, text


def _owners(key: str, images: dict, videos: dict, text: dict) -> Iterable[dict]:
    return (images, videos) if key in IMAGE_OPTIONS else (text,)
