"""Answer a question about an image, with the kernels patched in.

python examples/answer.py
python examples/answer.py --model lmms-lab/LLaVA-OneVision-1.5-4B-Instruct --image photo.jpg "What is unusual here?"
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava15_fast

ASSETS = Path(__file__).parents[1] / "assets"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("question", nargs="?", default="Describe this image.")
parser.add_argument("--model", default=str(ASSETS / "scenes_checkpoint"), help="By default the small trained checkpoint.")
parser.add_argument("--image", default=str(ASSETS / "samples/scene_0.png"))
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto", device_map=device)
processor = AutoProcessor.from_pretrained(arguments.model)
handle = llava15_fast.patch(model)

content = [{"type": "image", "image": arguments.image}, {"type": "text", "text": arguments.question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0])
print(handle.report())
