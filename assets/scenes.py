"""Drawn scenes and the one sentence that describes each: what the small checkpoint is trained on and asked about.

    "a red circle"    "a red circle above a blue square"    "a red circle left of a blue square"

Of two shapes the upper, or the left one, is named first, so every picture has exactly one right sentence. A scene
depends on nothing but its split, its index and the training seed; the splits never share a random stream.
"""

from __future__ import annotations

import math
import random
from typing import Any

from PIL import Image, ImageDraw

Colour = tuple[int, ...]

QUESTION = "Describe this image."
SIZE = 112
SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 205, 30),
    "pink": (240, 130, 185),
    "purple": (145, 50, 170),
    "black": (30, 30, 30),
}
RELATIONS = ("above", "left of")

# In pixels of a scene of SIZE x SIZE.
RADIUS = (15.0, 24.0)
MARGIN = 2.0
GAP = 4.0
MAX_OFFSET = 20.0
SUPERSAMPLING = 4


def training_scene(seed: int, index: int) -> tuple[Image.Image, str]:
    """Scene `index` of the endless stream that `seed` gives for training."""
    return draw_scene(random.Random(f"training/{seed}/{index}"))


def held_out_scene(index: int, size: int = SIZE) -> tuple[Image.Image, str]:
    """Scene `index` of the stream that no training seed can give."""
    return draw_scene(random.Random(f"held-out/{index}"), size)


def all_sentences() -> list[str]:
    """Every sentence a scene can have."""
    single = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    return single + [f"{first} {relation} {second}" for relation in RELATIONS for first in single for second in single]


def draw_scene(rng: random.Random, size: int = SIZE) -> tuple[Image.Image, str]:
    """A size x size picture of one shape (one scene in four) or two, and its sentence."""
    grey = rng.uniform(225, 255)
    canvas = Image.new("RGB", (size * SUPERSAMPLING,) * 2, _jitter(rng, (grey, grey, grey), 6))
    draw = ImageDraw.Draw(canvas)
    scale = size * SUPERSAMPLING / SIZE

    def place(x: float, y: float, radius: float) -> str:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        _draw_shape(draw, shape, x * scale, y * scale, radius * scale, _jitter(rng, COLOURS[colour], 20))
        return f"a {colour} {shape}"

    def between(low: float, high: float) -> float:
        """Off the border by MARGIN, whichever end the border is."""
        return rng.uniform(low + MARGIN, high - MARGIN)

    first_radius, second_radius = rng.uniform(*RADIUS), rng.uniform(*RADIUS)
    if rng.random() < 0.25:
        low, high = first_radius, SIZE - first_radius
        sentence = place(between(low, high), between(low, high), first_radius)
    else:
        distance = first_radius + second_radius + GAP
        # Along the axis of the relation the two keep their distance; across it they are nearly level.
        along = between(first_radius, SIZE - second_radius - distance)
        other_along = rng.uniform(along + distance, SIZE - second_radius - MARGIN)
        largest = max(first_radius, second_radius)
        across = between(largest + MAX_OFFSET / 2, SIZE - largest - MAX_OFFSET / 2)
        offset = rng.uniform(-MAX_OFFSET, MAX_OFFSET) / 2
        first, second = (across - offset, along), (across + offset, other_along)
        relation = rng.choice(RELATIONS)
        if relation == "left of":
            first, second = first[::-1], second[::-1]
        sentence = f"{place(*first, first_radius)} {relation} {place(*second, second_radius)}"
    return canvas.reduce(SUPERSAMPLING), sentence


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: Colour) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        half = 0.86 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "triangle":
        draw.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=colour)
    elif shape == "star":
        corners = [(radius if i % 2 == 0 else 0.42 * radius, math.pi * i / 5) for i in range(10)]
        draw.polygon([(x + r * math.sin(angle), y - r * math.cos(angle)) for r, angle in corners], fill=colour)
    else:
        arm = 0.33 * radius
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def _jitter(rng: random.Random, colour: tuple[float, ...], amount: float) -> Colour:
    return tuple(min(255, max(0, round(channel + rng.uniform(-amount, amount)))) for channel in colour)


def chat(image: Image.Image) -> list[dict[str, Any]]:
    """The question about `image`, as a chat."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]


def describe(model: Any, processor: Any, images: list[Image.Image], batch_size: int = 50) -> list[str]:
    """The model's sentence for every image."""
    sentences = []
    for start in range(0, len(images), batch_size):
        inputs = processor.apply_chat_template(
            [chat(image) for image in images[start : start + batch_size]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        sentences += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sentences


def held_out_accuracy(model: Any, processor: Any, indices: range = range(200)) -> float:
    """The share of held-out scenes whose sentence is exactly right."""
    images, expected = zip(*map(held_out_scene, indices), strict=True)
    answers = describe(model, processor, list(images))
    return sum(answer == sentence for answer, sentence in zip(answers, expected, strict=True)) / len(indices)
