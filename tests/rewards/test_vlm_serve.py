"""A real OpenAI-compatible server, `transformers serve`, judges images over HTTP, and is killed in the middle."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from diffalign import media
from diffalign.rewards.vlm import JudgeServer, LocalVLM, Question, YesLogit
from diffalign.rewards.vlm.questions import YES_NO, filled
from tests.rewards.tiny_vlm import save_vlm

# The wheel of torchvision lacks two things beside a CPU torch: its schemas, and the reading of images, here by Pillow.
SERVE = """
import io
import numpy, torch
from PIL import Image
from diffalign._compat import ensure_torchvision

if ensure_torchvision() == "repaired":
    import torchvision.io

    def decode_image(data, **options):
        pixels = numpy.asarray(Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB"))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    torchvision.io.decode_image = decode_image
from transformers.cli.transformers import main

main()
"""
PROMPTS = [
    f"{colour} {thing}" for colour in ("a red", "a blue", "two green") for thing in ("cat", "dog", "square", "sky")
]


def teach_to_answer(folder, images):
    """A head under which the tiny model says Yes or No, to about half of the images each."""
    judge = LocalVLM(folder)
    head, states = judge.model.get_output_embeddings(), []
    hook = head.register_forward_hook(lambda module, inputs, output: states.append(inputs[0][:, -1]))
    for image, prompt in zip(images, PROMPTS, strict=True):
        judge.log_probs([Question((image,), filled(YES_NO["vqascore-qwen"], prompt))], ["yes"])
    hook.remove()
    states = torch.cat(states).double()
    mean = states.mean(dim=0) / states.mean(dim=0).norm()
    across = states - (states @ mean)[:, None] * mean  # what differs between images, at right angles to the mean
    centred = across - across.median(dim=0).values
    direction = torch.linalg.svd(centred).Vh[0]
    direction = direction - (direction @ mean) * mean
    direction -= (across @ direction).median() / (states @ mean).mean() * mean  # half of them on each side
    tokens = judge.processor.tokenizer
    with torch.no_grad():
        head.weight.zero_()
        for word, sign in (("Yes", 1), ("No", -1)):
            head.weight[tokens.convert_tokens_to_ids(word)] = (3 * mean + sign * 5 * direction).float()
    judge.model.save_pretrained(folder)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serving(folder, port, log):
    """`transformers serve` on a loopback port, ready to answer; yields the process."""
    command = [sys.executable, "-W", "ignore", "-c", SERVE, "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--log-level", "warning"]
    # `make test` keeps torchvision, which the server's processor of videos needs, apart.
    folders = [str(Path(__file__).parents[2] / ".venv" / "open_clip"), *filter(None, sys.path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        wait_for(port, process, log)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(port, process, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.3)
    raise AssertionError(f"no server after five minutes: {log.read_text()[-3000:]}")


def kill_after(process, folder, count):
    """SIGKILL, as soon as ``count`` answers are on disk."""

    def watch():
        while process.poll() is None:
            if len(list(folder.rglob("*.json"))) >= count:
                process.send_signal(signal.SIGKILL)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.verify
@pytest.mark.timeout(900)
def test_a_real_server_judges_is_killed_and_comes_back(tmp_path):
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    generator = torch.Generator().manual_seed(0)
    images = media.quantise(
        torch.rand(12, 3, 56, 84, generator=generator) ** torch.linspace(0.2, 4, 12).view(-1, 1, 1, 1)
    )
    folder = save_vlm(tmp_path / "tiny-vlm")
    teach_to_answer(folder, images)
    local = YesLogit(LocalVLM(folder), score="logit")(images, PROMPTS).value
    assert 3 <= (local > 0).sum() <= 9
    assert local.abs().min() > 1e-3  # no answer hangs on rounding

    port, log, cache = free_port(), tmp_path / "server.log", tmp_path / "answers"

    def judge():
        server = JudgeServer(
            str(folder),
            f"http://127.0.0.1:{port}/v1",
            read="text",  # it gives no log-probabilities
            # the tiny model knows no end, and would say YesYesYes
            extra_body={"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 1},
            cache=cache,
            concurrency=1,
            retries=1,
        )
        return YesLogit(server)(images, PROMPTS)

    with serving(folder, port, log) as process:
        watcher = kill_after(process, cache, 5)
        first = judge()
        process.kill()  # the watcher has long done it, or will find nothing to wait for
        watcher.join()
    kept = len(list(cache.rglob("*.json")))
    assert 5 <= kept < 12
    assert int(first.valid.sum()) == kept
    assert set(first.reasons) == set((~first.valid).nonzero().flatten().tolist())
    assert all("cannot be reached" in reason for reason in first.reasons.values())
    assert torch.equal(first.value[first.valid], (local > 0).float()[first.valid])

    second_log = tmp_path / "second.log"
    with serving(folder, port, second_log):
        second = judge()
    assert second.valid.all()
    assert torch.equal(second.value, (local > 0).float())  # over HTTP as on this machine
    assert second_log.read_text().count("[Request received]") == 12 - kept  # what was kept was not asked again
    assert len(list(cache.rglob("*.json"))) == 12
