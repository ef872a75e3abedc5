"""The README's Python example runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    space = {}
    exec(compile(code, "README.md", "exec"), space)
    assert len(space["history"]) == 2
    assert (tmp_path / "runs/warm/pytorch_lora_weights.safetensors").is_file()
    assert space["image"].size == (64, 64)


def test_the_recipe_for_a_real_checkpoint_is_valid(tmp_path):
    from diffalign.config import load_recipe

    (recipe,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "my").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "my" / f"{split}.txt").write_text("a horse on the moon\n")
    loaded = load_recipe(tmp_path / "recipe.yaml")
    assert loaded.evaluation.guidance_scale == 7.5
