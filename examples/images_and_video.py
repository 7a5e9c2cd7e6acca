"""A batch of one prompt with two images and one with a video, which is given as its frames.

python examples/images_and_video.py [--model lmms-lab/LLaVA-OneVision-1.5-4B-Instruct]
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava15_fast

ASSETS = Path(__file__).parents[1] / "assets"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(ASSETS / "scenes_checkpoint"), help="By default the small trained checkpoint.")
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto", device_map=device)
processor = AutoProcessor.from_pretrained(arguments.model)
llava15_fast.patch(model)

images = [Image.open(path) for path in sorted((ASSETS / "samples").glob("*.png"))]
question = {"type": "text", "text": "Describe this image."}
conversations = [
    [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "image", "image": images[1]}, question]}],
    [{"role": "user", "content": [{"type": "video", "video": images}, question]}],
]
# Prompts of a batch are padded on the left; the kernels skip the padding.
prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
inputs = processor(text=prompts, images=images[:2], videos=[images], padding=True, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
for name, answer in zip(("two images", "a video"), output[:, inputs.input_ids.shape[1] :], strict=True):
    print(f"{name}: {processor.decode(answer, skip_special_tokens=True)}")
