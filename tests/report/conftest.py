import json

import numpy as np
import pytest
from PIL import Image

from diffalign.report import Pair, Summary, compare


def metrics_rows(steps: int = 41) -> list[dict]:
    rows = []
    for step in range(steps):
        row = {"step": step}
        if step:
            row |= {"loss": -0.1 * step, "reward/clip": 0.01 * step, "grad_norm": 1.0, "prediction_mse": 1e-4 * step}
        if step % 10 == 0:
            row |= {"validation/clip": 0.01 * step, "heldout/shapes-oracle": 0.5 + 0.001 * step, "diversity": 0.4}
        rows.append(row)
    return rows


@pytest.fixture
def run(tmp_path):
    """A run folder with a space in its name and six images, without metrics; and the summary of the run."""
    return build_run(tmp_path / "a run")


@pytest.fixture(scope="session")
def run_with_metrics(tmp_path_factory):
    """The same with metrics, not to be changed."""
    folder, summary = build_run(tmp_path_factory.mktemp("runs") / "a run")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics_rows()))
    return folder, summary


def build_run(folder):
    folder.mkdir()
    generator = np.random.default_rng(0)
    pairs = []
    for index, prompt in enumerate(["a red circle", '<script>alert("x")</script> & more', "a blue square"]):
        for side in ("base", "tuned"):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{side}-{index}.png")
        scores = {"clip": (0.1, 0.2), "failed": (float("nan"), 0.3)}
        pairs.append(Pair(prompt, f"seed 0, image {index}", f"base-{index}.png", f"tuned-{index}.png", scores))
    values = generator.normal(size=40)
    figures = [
        compare("clip", "training", values, values + 1, range(40)),
        compare("oracle", "oracle", values > 0, values > -3, range(40), unit="%"),
        compare("lonely", "heldout", [1.0], [2.0], [0]),
        compare("nothing", "diversity", [float("nan")], [2.0], [0]),
    ]
    summary = Summary(
        title="shapes <tuned>",
        pipeline="owner/model",
        facts={"Method": "reward_backprop"},
        figures=figures,
        gallery=pairs,
        cost={"training": {"nfe": 76800, "seconds": 552.1, "peak_memory_bytes": 2**31}},
        sampling={"num_inference_steps": 20, "guidance_scale": 3.0},
        notes=["measured & written down"],
        recipe="seed: 0\n",
        versions={"torch": "2.13.0"},
        prompts="prompts:test",
    )
    return folder, summary
