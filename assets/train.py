"""Trains the small checkpoint that describes drawn scenes, and everything that belongs to it.

    python -m assets.train                     writes assets/scenes_checkpoint and assets/samples

The tokenizer, the processor, the configuration and the weights are written in the published format. The same seed on
the same machine and code gives the same files; about half an hour on two CPU cores that do nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    set_seed,
)

from llava15_fast.model.configuration import LlavaOnevision1_5Config
from llava15_fast.model.modeling import LlavaOnevision1_5ForConditionalGeneration
from llava15_fast.model.processing import LlavaOnevision1_5Processor

from .scenes import QUESTION, SIZE, all_sentences, chat, held_out_accuracy, held_out_scene, training_scene

ASSETS = Path(__file__).parent
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SYSTEM = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Scene index of the held-out stream and size of each sample picture.
SAMPLES = ((1000, SIZE), (1001, SIZE), (1002, 2 * SIZE), (1003, 3 * SIZE))


def make_processor() -> LlavaOnevision1_5Processor:
    """The processor over a byte-level BPE tokenizer of the words that occur here.

    Every picture is brought to about the area of a scene, so a bigger one works as well.
    """
    untrained = Qwen2Tokenizer(vocab={}, merges=[])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = untrained.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*all_sentences(), QUESTION, SYSTEM, "system", "user", "assistant"], trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )
    image_processor = Qwen2VLImageProcessorPil(temporal_patch_size=1, min_pixels=SIZE**2, max_pixels=SIZE**2)
    return LlavaOnevision1_5Processor(image_processor, tokenizer)


def make_config(tokenizer: Any) -> LlavaOnevision1_5Config:
    """Every piece of the published architecture, small."""
    token_id = tokenizer.convert_tokens_to_ids
    return LlavaOnevision1_5Config(
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_heads": 4,
            "text_hidden_size": 128,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "max_window_layers": 3,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        dtype="float32",
    )


class TrainingScenes(Dataset):
    """(pixel_values, sentence) of `count` scenes."""

    def __init__(self, seed: int, count: int, image_processor: Qwen2VLImageProcessorPil) -> None:
        self.seed, self.count, self.image_processor = seed, count, image_processor

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        image, sentence = training_scene(self.seed, index)
        return self.image_processor(image, return_tensors="pt")["pixel_values"], sentence


class Collator:
    """Scenes -> the model's inputs with labels on the answers only.

    The prompt is the same for all, so nothing but the answers needs padding; it comes last, where causal attention
    keeps it out of sight without a mask.
    """

    def __init__(self, processor: LlavaOnevision1_5Processor) -> None:
        self.tokenizer = processor.tokenizer
        inputs = processor.apply_chat_template(
            chat(Image.new("RGB", (SIZE, SIZE))),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        self.prompt, self.grid = inputs["input_ids"], inputs["image_grid_thw"]

    def __call__(self, scenes: list[tuple[torch.Tensor, str]]) -> dict[str, torch.Tensor]:
        pixels, sentences = zip(*scenes, strict=True)
        answers = self.tokenizer(
            [sentence + self.tokenizer.eos_token for sentence in sentences],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        prompts = self.prompt.expand(len(scenes), -1)
        targets = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
        return {
            "input_ids": torch.cat([prompts, answers["input_ids"]], dim=1),
            "labels": torch.cat([torch.full_like(prompts, -100), targets], dim=1),
            "pixel_values": torch.cat(pixels),
            "image_grid_thw": self.grid.expand(len(scenes), -1),
        }


def train(
    model: LlavaOnevision1_5ForConditionalGeneration,
    processor: LlavaOnevision1_5Processor,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """AdamW with a linear warmup and a cosine to zero, each scene seen once."""
    # Matrices decay; norms, biases and the class row do not.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    warmup = min(200, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    scenes = TrainingScenes(seed, steps * batch_size, processor.image_processor)
    batches = DataLoader(scenes, batch_size, collate_fn=Collator(processor), num_workers=1, prefetch_factor=4)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    model.train()
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        for batch in batches:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, loss=loss.item())
    model.eval()


def save_checkpoint(
    model: LlavaOnevision1_5ForConditionalGeneration, processor: LlavaOnevision1_5Processor, folder: Path
) -> None:
    """The published format; the weights in float16 to keep the file small, computed with in float32."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id],
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, state_dict={name: tensor.half() for name, tensor in model.state_dict().items()})
    processor.save_pretrained(folder)


def save_samples(folder: Path) -> None:
    """Held-out scenes as PNG files, with their sentences in answers.json."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = {}
    for number, (index, size) in enumerate(SAMPLES):
        image, sentence = held_out_scene(index, size)
        name = f"scene_{number}.png"
        image.save(folder / name)
        answers[name] = sentence
    (folder / "answers.json").write_text(json.dumps(answers, indent=2) + "\n")


def main() -> None:
    """Makes the checkpoint and the samples, and reports what they are worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "scenes_checkpoint", help="folder of the checkpoint")
    parser.add_argument("--samples", type=Path, default=ASSETS / "samples", help="folder of the sample pictures")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    # Sums depend on how the work is split; two threads on every machine.
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    set_seed(options.seed)
    processor = make_processor()
    model = LlavaOnevision1_5ForConditionalGeneration(make_config(processor.tokenizer))
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(processor.tokenizer)} tokens")

    start = time.perf_counter()
    train(model, processor, options.seed, options.steps, options.batch_size, options.learning_rate)
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes")
    save_checkpoint(model, processor, options.out)
    save_samples(options.samples)
    print(f"held-out accuracy, exact sentence: {held_out_accuracy(model, processor):.1%} in float32")

    model = AutoModelForImageTextToText.from_pretrained(options.out)
    processor = AutoProcessor.from_pretrained(options.out)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"from the saved file: {held_out_accuracy(model, processor):.1%}, {size / 1e6:.2f} MB in {options.out}")


if __name__ == "__main__":
    main()
