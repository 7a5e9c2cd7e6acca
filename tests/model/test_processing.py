"""The processor, with the small checkpoint's tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from llava15_fast import LlavaOnevision1_5Processor
from llava15_fast.model.processing import read_image

CHECKPOINT = Path(__file__).parents[2] / "assets/scenes_checkpoint"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


def picture(width=112, height=84, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def conversation(*images, text="Describe this image."):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


OPTIONS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def test_chat_template_with_an_image(processor):
    inputs = processor.apply_chat_template(conversation(picture()), **OPTIONS)
    (grid,) = inputs.image_grid_thw.tolist()
    assert inputs.pixel_values.shape == (grid[1] * grid[2], 588) and grid[0] == 1
    assert (inputs.input_ids == processor.image_token_id).sum() == grid[1] * grid[2] // 4
    text = processor.decode(inputs.input_ids[0])
    assert text.count(IMAGE) == grid[1] * grid[2] // 4 and text.endswith("<|im_start|>assistant\n")
    assert inputs.to("cpu").input_ids.device.type == "cpu"


def test_pixels_are_the_image_processors(processor):
    """Patches come from transformers' Pillow processor, in merge-block order."""
    image = picture()
    reference = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)(image, temporal_patch_size=1, return_tensors="pt")
    inputs = processor(images=image, text=IMAGE, return_tensors="pt")
    assert torch.equal(inputs.pixel_values, reference.pixel_values)
    assert torch.equal(inputs.image_grid_thw, reference.image_grid_thw)


def test_several_images_of_different_sizes(processor):
    inputs = processor.apply_chat_template(conversation(picture(112, 84), picture(56, 140)), **OPTIONS)
    assert inputs.image_grid_thw.shape == (2, 3)
    patches = inputs.image_grid_thw.prod(-1)
    assert inputs.pixel_values.shape[0] == patches.sum()
    assert (inputs.input_ids == processor.image_token_id).sum() == patches.sum() // 4


def test_batch_is_padded_on_the_left(processor):
    batch = [conversation(picture(112, 84)), conversation(picture(56, 56), text="What is it?"), conversation(text="Hello.")]
    inputs = processor.apply_chat_template(batch, **OPTIONS, processor_kwargs={"padding": True})
    direct = processor.apply_chat_template(batch, **OPTIONS, padding=True)
    assert all(torch.equal(inputs[key], direct[key]) for key in inputs)
    mask = inputs.attention_mask
    assert mask.shape[0] == 3 and (mask.diff(dim=-1) >= 0).all() and mask[:, -1].all() and not mask.all()
    right = processor(text=["a", "a b c d"], padding=True, padding_side="right", return_tensors="pt")
    assert right.attention_mask[:, 0].all()
    chosen = AutoProcessor.from_pretrained(CHECKPOINT, padding_side="right")
    assert chosen(text=["a", "a b c d"], padding=True, return_tensors="pt").attention_mask[:, 0].all()


@pytest.mark.parametrize("kind", ["paths", "images", "arrays", "tensor"])
def test_video_frames(processor, kind, tmp_path):
    frames = [picture(56, 84, seed) for seed in range(3)]
    if kind == "paths":
        for i, frame in enumerate(frames):
            frame.save(tmp_path / f"{i}.png")
        video = [str(tmp_path / f"{i}.png") for i in range(3)]
    elif kind == "images":
        video = frames
    else:
        video = np.stack([np.asarray(frame) for frame in frames])
        video = torch.from_numpy(video) if kind == "tensor" else video
    message = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "What happens?"}]}]
    inputs = processor.apply_chat_template(message, **OPTIONS)
    ((t, h, w),) = inputs.video_grid_thw.tolist()
    assert t == 3 and inputs.pixel_values_videos.shape == (3 * h * w, 588)
    assert (inputs.input_ids == processor.video_token_id).sum() == 3 * h * w // 4
    alone = processor(images=frames[1], text=IMAGE, return_tensors="pt")
    assert torch.equal(inputs.pixel_values_videos[h * w : 2 * h * w], alone.pixel_values)


def test_pixel_limits(processor):
    image = picture(400, 300)
    for options in ({"max_pixels": 56 * 56}, {"images_kwargs": {"max_pixels": 56 * 56}}):
        grid = processor(images=image, text=IMAGE, min_pixels=28 * 28, **options).image_grid_thw[0]
        assert grid[1] * grid[2] * 14 * 14 <= 56 * 56
    larger = processor(images=image, text=IMAGE, min_pixels=800 * 800, max_pixels=1000 * 1000).image_grid_thw[0]
    assert larger[1] * larger[2] * 14 * 14 >= 800 * 800
    loaded = AutoProcessor.from_pretrained(CHECKPOINT, min_pixels=28 * 28, max_pixels=56 * 56)
    assert np.prod(loaded(images=image, text=IMAGE).image_grid_thw[0]) * 14 * 14 <= 56 * 56
    # The shipped checkpoint asks for 12544 pixels either way; a limit of the call takes the other one along.
    assert np.prod(processor(images=image, text=IMAGE, max_pixels=3136).image_grid_thw[0]) * 14 * 14 <= 3136
    with pytest.raises(ValueError, match="min_pixels 5000 and max_pixels 100"):
        processor(images=image, text=IMAGE, min_pixels=5000, max_pixels=100)
    with pytest.raises(ValueError, match="min_pixels 1000000000000000 is more than Pillow's limit of 178956970"):
        processor(images=image, text=IMAGE, min_pixels=10**15)


def test_batch_decode(processor):
    ids = processor(text=["a red circle", "a blue square"], padding=True).input_ids
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a red circle", "a blue square"]


def test_save_and_reload(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "LlavaOnevision1_5Processor"
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    for reloaded in (AutoProcessor.from_pretrained(tmp_path), LlavaOnevision1_5Processor.from_pretrained(tmp_path)):
        assert type(reloaded) is LlavaOnevision1_5Processor
        ours, theirs = (p.apply_chat_template(conversation(picture()), **OPTIONS) for p in (processor, reloaded))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_files_as_published_that_name_another_processor(tmp_path):
    """The published repositories name Qwen2.5-VL's processor, which needs torchvision."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = AutoProcessor.from_pretrained(CHECKPOINT).chat_template
    tokenizer |= {"processor_class": "Qwen2_5_VLProcessor", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    published = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 1,
        "merge_size": 2,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(processor) is LlavaOnevision1_5Processor
    inputs = processor.apply_chat_template(conversation(picture(1120, 1120)), **OPTIONS)
    assert inputs.image_grid_thw.tolist() == [[1, 80, 80]]


# Images that are strange, and images that cannot be read


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_every_mode_of_pillow(mode):
    image = (
        Image.new("I;16", (40, 30), 1000)
        if mode == "I;16"
        else picture(40, 30).convert("L" if mode in "IF" else "RGB").convert(mode)
    )
    result = read_image(image)
    assert result.mode == "RGB" and result.size == (40, 30)


def test_16_bit_images_keep_their_contrast():
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    pixels = np.asarray(read_image(Image.fromarray(values)))[..., 0]
    assert pixels.min() == 0 and pixels.max() == 255 and len(np.unique(pixels)) > 50


def test_exif_orientation_is_applied(tmp_path):
    image = picture(40, 20)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "rotated.jpg", exif=exif)
    assert read_image(tmp_path / "rotated.jpg").size == (20, 40)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (199, 1), (2000, 15)])
def test_extreme_sizes(processor, size):
    inputs = processor(images=picture(*size), text=IMAGE, return_tensors="pt")
    assert inputs.pixel_values.isfinite().all() and inputs.pixel_values.shape[0] == inputs.image_grid_thw.prod()


def test_unreadable_images_are_named(processor, tmp_path):
    picture().save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name, reason in (("half.png", "truncated"), ("text.jpg", "not an image"), ("empty.png", "not an image")):
        with pytest.raises(ValueError, match=f"cannot read image .*{name}.*{reason}"):
            processor(images=str(tmp_path / name), text=IMAGE)
    with pytest.raises(ValueError, match=r"no image file .*nowhere\.png"):
        processor(images=tmp_path / "nowhere.png", text=IMAGE)
    with pytest.raises(ValueError, match="given as int"):
        processor(images=3, text=IMAGE)
    with pytest.raises(ValueError, match="cannot read image"):
        processor(images=str(tmp_path), text=IMAGE)


def test_counts_must_match(processor):
    with pytest.raises(ValueError, match=r"2 .*image_pad.* placeholders in the text, but 1 images"):
        processor(images=picture(), text=IMAGE * 2)
    with pytest.raises(ValueError, match=r"0 .*image_pad.* placeholders in the text, but 1 images"):
        processor(images=picture(), text="no placeholder")
    with pytest.raises(ValueError, match=r"1 .*video_pad.* placeholders in the text, but 0 videos"):
        processor(text=VIDEO)
    with pytest.raises(ValueError, match="at least one of"):
        processor()
    with pytest.raises(ValueError, match=r"images per prompt are \[2, 1\], but the prompts have \[1, 2\]"):
        processor(text=[IMAGE, IMAGE * 2], images=[[picture(), picture()], [picture()]], padding=True)
    with pytest.raises(ValueError, match="no audio"):
        processor(text="x", audio=[0.0])


@pytest.mark.parametrize("kind", ["array", "frames", "tensor", "uint16"])
def test_a_dark_frame_is_as_dark_as_it_is(processor, kind):
    """Numbers from 0 to 255, of which one frame has only 0 and 1: the whole video says what they count."""
    video = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    video[1] = video[1] > 128
    expected = processor(videos=[video], text=VIDEO, return_tensors="pt").pixel_values_videos
    given = video.astype(np.uint16) * 257 if kind == "uint16" else video.astype(np.float32)
    given = {"frames": list(given), "tensor": torch.from_numpy(given) if kind == "tensor" else None}.get(kind, given)
    found = processor(videos=[given], text=VIDEO, return_tensors="pt").pixel_values_videos
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_videos_per_prompt(processor):
    a, b, c = (np.full((2, 56, 56, 3), value, np.uint8) for value in (10, 90, 200))
    right = processor(text=[VIDEO * 2, VIDEO], videos=[[a, b], [c]], padding=True)
    assert len(right.video_grid_thw) == 3
    for videos, counts in (([[a], [b, c]], r"\[1, 2\]"), ([[list(a)], [list(b), list(c)]], r"\[1, 2\]")):
        with pytest.raises(ValueError, match=rf"videos per prompt are {counts}, but the prompts have \[2, 1\]"):
            processor(text=[VIDEO * 2, VIDEO], videos=videos, padding=True)
    frames = processor(text=[VIDEO, VIDEO], videos=[list(a), list(b)], padding=True)  # lists of frames are videos
    assert frames.video_grid_thw[:, 0].tolist() == [2, 2]


@pytest.mark.parametrize("name", ["merge_size", "patch_size", "temporal_patch_size"])
def test_sizes_that_the_model_was_trained_with_cannot_be_changed(processor, name):
    same = {name: getattr(processor.image_processor, name)}
    assert processor(images=picture(), text=IMAGE, **same).image_grid_thw.shape == (1, 3)
    with pytest.raises(ValueError, match=rf"{name} 7: expected {same[name]}"):
        processor(images=picture(), text=IMAGE, **{name: 7})


@pytest.mark.parametrize("value", ["x", [3], True])
def test_pixel_limits_are_numbers(processor, value):
    with pytest.raises(ValueError, match=r"min_pixels.*expected int, got .*\(value: "):
        processor(images=picture(), text=IMAGE, min_pixels=value)


def test_tensors_that_hold_no_values_are_named(processor):
    for tensor in (torch.zeros(3, 8, 8, device="meta"), torch.eye(8).to_sparse()):
        with pytest.raises(ValueError, match="cannot read an image tensor"):
            processor(images=tensor, text=IMAGE)


def test_bad_videos_are_named(processor):
    with pytest.raises(ValueError, match="a video has no frames"):
        processor(videos=np.zeros((0, 56, 56, 3), np.uint8), text=VIDEO)
    with pytest.raises(ValueError, match="different sizes"):
        processor(videos=[picture(56, 56), picture(112, 56)], text=VIDEO)
    with pytest.raises(ValueError, match=r"video 'clip\.mp4': decode it first"):
        processor(videos="clip.mp4", text=VIDEO)
    with pytest.raises(ValueError, match="given as int"):
        processor(videos=[3], text=VIDEO)
    with pytest.raises(ValueError, match=r"clip\.mp4.*has to be decoded first"):
        processor(videos=["clip.mp4"], text=VIDEO)


def test_base64_and_grey_arrays(processor, tmp_path):
    import base64

    picture().save(tmp_path / "a.png")
    encoded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    content = [{"type": "image", "base64": encoded}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **OPTIONS)
    assert torch.equal(inputs.pixel_values, processor(images=picture(), text=IMAGE, return_tensors="pt").pixel_values)
    grey = np.asarray(picture().convert("L"))
    for array in (grey, torch.from_numpy(grey.copy())):
        assert read_image(array).mode == "RGB"
    assert np.asarray(read_image(grey > 100)).max() == 255
    with pytest.raises(ValueError, match="holds no pixels"):
        processor(images=grey[:0], text=IMAGE)
