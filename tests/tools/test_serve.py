"""`transformers serve` on a patched model: an OpenAI client asks about an image, plain and streamed."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from assets.scenes import QUESTION

openai = pytest.importorskip("openai")
for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
CHECKPOINT, SAMPLES = ROOT / "assets/scenes_checkpoint", ROOT / "assets/samples"
SECONDS = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address, and the file of what it writes to standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "stderr"
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": path, "LLAVA15_FAST_BACKEND": "torch", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "llava15_fast.run", "-m", "transformers.cli.transformers", "serve", str(CHECKPOINT)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as stderr, subprocess.Popen(command, env=variables, stdout=stderr, stderr=stderr) as process:
        try:
            wait_for(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1", log
        finally:
            process.kill()


def wait_for(process, address, log):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=SECONDS):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"the server does not answer:\n{log.read_text()[-3000:]}")


def test_an_image_is_described(server):
    address, log = server
    client = openai.OpenAI(base_url=address, api_key="none", timeout=SECONDS, max_retries=0)
    for name, answer in list(json.loads((SAMPLES / "answers.json").read_text()).items())[:2]:
        data = base64.b64encode((SAMPLES / name).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]
        asked = {"model": str(CHECKPOINT), "messages": messages, "temperature": 0, "max_tokens": 64}
        plain = client.chat.completions.create(**asked)
        assert plain.choices[0].message.content == answer
        with client.chat.completions.create(**asked, stream=True) as parts:
            streamed = [part.choices[0].delta.content or "" for part in parts if part.choices]
        assert "".join(streamed) == answer and sum(map(bool, streamed)) > 1
    assert "patched LlavaOnevision1_5ForConditionalGeneration, backend torch" in log.read_text()
