"""Evaluate with lmms-eval, unmodified: its `llava_onevision1_5` model, patched by `python -m llava15_fast.run`.

pip install lmms-eval qwen-vl-utils
python examples/evaluate.py                  # the small checkpoint on the sample images
python examples/evaluate.py --model lmms-lab/LLaVA-OneVision-1.5-4B-Instruct --tasks mmmu_val --batch-size 8
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"

TASK = """
task: scenes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: "Describe this image."
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 16, temperature: 0, num_beams: 1, do_sample: false}}
process_results: !function utils.score
metric_list: [{{metric: equal, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0}}]
"""

UTILS = """
from PIL import Image

def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def score(doc, results):
    return {"equal": float(results[0] == doc["answer"])}
"""


def sample_task(folder: Path) -> None:
    """A task "scenes" of the sample images and what the small checkpoint says about them."""
    answers = json.loads((ASSETS / "samples/answers.json").read_text())
    rows = [json.dumps({"image": str(ASSETS / "samples" / name), "answer": answer}) for name, answer in answers.items()]
    (folder / "data.jsonl").write_text("\n".join(rows))
    (folder / "scenes.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    (folder / "utils.py").write_text(UTILS)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(ASSETS / "scenes_checkpoint"), help="By default the small trained checkpoint.")
parser.add_argument("--tasks", default="scenes", help="Tasks of lmms-eval, by default the sample images.")
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--device", default="cpu", help="cuda for a real model.")
parser.add_argument("--output", default=None, help="A folder for lmms-eval's results.")
arguments = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    sample_task(Path(folder))
    options = f"pretrained={arguments.model},device={arguments.device},device_map={arguments.device}"
    command = [sys.executable, "-m", "llava15_fast.run", "-m", "lmms_eval", "--model", "llava_onevision1_5"]
    command += ["--model_args", options, "--include_path", folder, "--tasks", arguments.tasks]
    command += ["--batch_size", str(arguments.batch_size)]
    if arguments.output:
        command += ["--log_samples", "--output_path", arguments.output]
    sys.exit(subprocess.run(command).returncode)
