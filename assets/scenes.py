"""Drawn scenes and the one sentence that describes each: what the small checkpoint is trained and tested on.

    "a red circle"    "a red circle above a blue square"    "a red circle left of a blue square"

Of two shapes the upper, or the left one, is named first, so every picture has exactly one right sentence. A scene
depends on nothing but its split, its index and the training seed; the splits never share a random stream.
"""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

QUESTION = "Describe this image."
SIZE = 112
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 205, 30),
    "purple": (145, 50, 170),
    "black": (30, 30, 30),
}
RELATIONS = ("above", "left of")

# In pixels of a scene of SIZE x SIZE.
RADIUS = (17.0, 23.0)
MARGIN = 2.0
GAP = 4.0
MAX_OFFSET = 14.0
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


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, ...]
) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        half = 0.86 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "triangle":
        draw.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=colour)
    else:
        arm = 0.33 * radius
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def _jitter(rng: random.Random, colour: tuple[float, ...], amount: float) -> tuple[int, ...]:
    return tuple(min(255, max(0, round(channel + rng.uniform(-amount, amount)))) for channel in colour)
