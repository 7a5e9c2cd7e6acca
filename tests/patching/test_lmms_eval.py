"""lmms-eval's own wrapper, unmodified, under `python -m llava15_fast.run`: our model, patched, the answers of plain `generate`.

Skipped without lmms-eval (0.7.x; it asks for hundreds of packages that it does not need here, torchvision among them: install
it with --no-deps, and after it what it misses when imported). Its wrapper reads pictures through qwen_vl_utils, which imports
torchvision; `STAND_IN` does that with Pillow.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "assets/scenes_checkpoint"
SAMPLES = sorted((ROOT / "assets/samples").glob("*.png"))
QUESTION = "Describe this image."
TOKENS = 16

NEEDED = ("lmms_eval", "datasets", "loguru", "decord", "evaluate", "sacrebleu", "pytablewriter", "aiohttp")
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDED) or torch.cuda.is_available(),
    reason=f"needs {', '.join(NEEDED)}, and is for a CPU",
)

STAND_IN = '''
"""process_vision_info with Pillow, and a count of what the patched model ran."""
import atexit, json, os
from collections import Counter
from pathlib import Path
from llava15_fast.fast.runtime import Record

def process_vision_info(conversations, **kwargs):
    parts = [part for talk in conversations for message in talk for part in message["content"] if isinstance(part, dict)]
    return [part["image"] for part in parts if part["type"] == "image"] or None, None

ran, run = Counter(), Record.run

def counted(self, method, how):
    run(self, method, how)
    ran[f"{method}: {how}"] += 1

Record.run = counted
atexit.register(lambda: Path(os.environ["RAN"]).write_text(json.dumps(ran)))
'''

TASK = """
task: scenes
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{question}"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, num_beams: 1, do_sample: false}}
process_results: !function utils.process_results
metric_list: [{{metric: equal, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0}}]
"""

UTILS = """
from PIL import Image
def doc_to_visual(doc): return [Image.open(doc["image"]).convert("RGB")]
def process_results(doc, results): return {"equal": float(results[0] == doc["answer"])}
"""


def answers():
    """What the model says unpatched, to the prompt that the wrapper makes."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    for path in SAMPLES:
        content = [{"type": "image", "image": Image.open(path)}, {"type": "text", "text": QUESTION}]
        talk = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": content}]
        inputs = processor.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        yield path, processor.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0]


def test_lmms_eval(tmp_path, batch_size=3):
    expected = dict(answers())
    (tmp_path / "qwen_vl_utils.py").write_text(STAND_IN)
    task = tmp_path / "task"
    task.mkdir()
    data = "\n".join(json.dumps({"image": str(path), "answer": answer}) for path, answer in expected.items())
    (task / "data.jsonl").write_text(data)
    (task / "scenes.yaml").write_text(TASK.format(data=task / "data.jsonl", question=QUESTION, tokens=TOKENS))
    (task / "utils.py").write_text(UTILS)
    limits = "min_pixels=12544,max_pixels=12544"
    command = [sys.executable, "-m", "llava15_fast.run", "-m", "lmms_eval", "--model", "llava_onevision1_5"]
    command += ["--model_args", f"pretrained={CHECKPOINT},device=cpu,device_map=cpu,{limits}"]
    command += ["--include_path", str(task), "--tasks", "scenes", "--batch_size", str(batch_size)]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels"), *sys.path[1:]])}
    environment |= {"RAN": str(tmp_path / "ran.json"), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    (samples,) = (tmp_path / "out").rglob("*samples_scenes.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(found) == len(SAMPLES)
    assert all(sample["equal"] == 1.0 for sample in found), found
    ran = json.loads((tmp_path / "ran.json").read_text())
    calls = -(-len(SAMPLES) // batch_size)
    assert ran["visual.encode: torch"] == calls and ran["language_model: torch"] > calls
    assert "patched LlavaOnevision1_5ForConditionalGeneration" in done.stderr
