"""What a recipe points to: paths made absolute, names and files checked before anything is loaded, contents hashed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from diffalign.recipe_problems import Problem, suggest
from diffalign.registry import PAIR_SUFFIXES, PROMPT_SUFFIXES, UnknownName, data_root, resolve_data

SPLITS = ("train", "validation", "test")
PLACES = {
    "pipeline": ("path", "tiny_decoder"),
    "adapter": ("path",),
    "method": ("noisy_reward", "pairs"),
    "prompts": SPLITS,
    "sft": ("images",),
}
"""Keys of a recipe that hold a path or a name, by section."""
DRAWN = {"method.pairs": PAIR_SUFFIXES, "sft.images": (".jsonl",)}
"""Keys whose files `diffalign sample` writes, and the suffixes of these."""
PIPELINES = (
    "FluxPipeline",
    "LatentConsistencyModelPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "QwenImagePipeline",
    "SanaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
)
"""The classes that the families of `diffalign.policies` drive, listed here since importing those loads torch."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    """Makes the relative paths of a recipe's tree absolute, in place, as seen from the folder of its file.

    Names of what ships (`zoo:`, `prompts:`), hub ids and reward names stay. `output_dir` stays too: runs go to the
    working directory, not beside a recipe that may lie in an installed package. So do pairs and lists of images that
    are not beside the recipe: a command of the user's wrote them.
    """
    folder = folder.resolve()
    for section, key in ((section, key) for section, keys in PLACES.items() for key in keys):
        values = tree.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str) and not _is_name(section, values[key], folder):
            values[key] = str(folder / Path(values[key]).expanduser())
    listed = tree.get("prompts")  # a search has one file, or a list of texts
    if isinstance(listed, str) and not _is_name("prompts", listed, folder):
        tree["prompts"] = str(folder / Path(listed).expanduser())
    if isinstance(tree.get("rewards"), dict):
        for name in ("train", "heldout"):
            _anchor_rewards(tree["rewards"].get(name), folder)
    asked = tree.get("resume_from_checkpoint")
    if isinstance(asked, str) and asked != "latest":
        tree["resume_from_checkpoint"] = str(folder / Path(asked).expanduser())


def _is_name(section: str, value: str, folder: Path) -> bool:
    if value.startswith(("zoo:", "prompts:")):
        return True
    if section in ("method", "sft") and value.endswith(PAIR_SUFFIXES):
        return not (folder / Path(value).expanduser()).exists()
    return section == "pipeline" and _HUB_ID.fullmatch(value) is not None and not (folder / value).exists()


def _anchor_rewards(terms: Any, folder: Path) -> None:
    """Reward recipes named by file, in a list (of a recipe) or in a mapping from indices (of overrides)."""
    places = terms.items() if isinstance(terms, dict) else enumerate(terms) if isinstance(terms, list) else ()
    for place, term in list(places):
        if _is_reward_file(term):
            terms[place] = str(folder / Path(term).expanduser())
        elif isinstance(term, dict) and _is_reward_file(term.get("name")):
            term["name"] = str(folder / Path(term["name"]).expanduser())


def _is_reward_file(name: Any) -> bool:
    return isinstance(name, str) and name.endswith((".yaml", ".yml"))


def check_references(tree: dict[str, Any], absent: Collection[str] = ()) -> list[Problem]:
    """Names that nothing answers to, files that are not there and packages that are not installed.

    Values of the wrong type are skipped here; the schema tells them.

    Args:
        tree: a recipe's.
        absent: keys of `DRAWN` whose files need not be there; their names must end as such files do.
    """
    problems: list[Problem] = []
    for key, value in _texts(tree):
        to_come = key in absent and value.endswith(DRAWN[key]) and not Path(value).exists()
        message = None if to_come else _wrong(key, value)
        if message:
            problems.append(Problem(f"{key} = {value}", message))
    return problems


def _texts(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The (key, value) of every reference in the tree."""
    found: list[tuple[str, Any]] = []
    for section, names in PLACES.items():
        found += [(f"{section}.{name}", _section(tree, section).get(name)) for name in names]
    for kind in ("train", "heldout"):
        for i, term in enumerate(_items(_section(tree, "rewards").get(kind))):
            found.append((f"rewards.{kind}.{i}", term.get("name") if isinstance(term, dict) else term))
    found.append(("prompts", tree.get("prompts")))
    found += [(f"report_to.{i}", name) for i, name in enumerate(_items(tree.get("report_to")))]
    asked = tree.get("resume_from_checkpoint")
    found.append(("resume_from_checkpoint", None if asked == "latest" else asked))
    yield from ((key, value) for key, value in found if isinstance(value, str))


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _wrong(key: str, value: str) -> str | None:
    if key.startswith("rewards."):
        return _wrong_reward(value)
    if key.startswith("report_to."):
        if value in ("wandb", "trackio") and importlib.util.find_spec(value) is None:
            return f"{value} is not installed: pip install 'diffalign[tracking]', or report to tensorboard"
        return None
    if key.startswith("pipeline.") and _HUB_ID.fullmatch(value):
        return None  # a hub id; whether it is there only the hub knows
    try:
        path = resolve_data(value, Path.cwd())
    except UnknownName as error:
        return str(error)
    if key == "pipeline.path":
        return _wrong_pipeline(path)
    if key == "method.noisy_reward":
        missing = [name for name in ("config.json", "heads.safetensors") if not (path / name).is_file()]
        told = "give a folder that `diffalign train` made by the method noisy_reward, or zoo:NAME"
        return f"holds no noise-aware reward: {missing[0]} is missing; {told}" if missing else None
    if key == "pipeline.tiny_decoder":
        there = (path / "config.json").is_file()
        return None if there else "is no folder of an AutoencoderTiny: give one, or a hub id such as madebyollin/taesd"
    if key == "adapter.path":
        file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
        return (
            None if file.is_file() else f"is no LoRA: {file.name} is missing; give a folder that holds one, or its file"
        )
    if key == "method.pairs":
        told = f"give pairs ({', '.join(PAIR_SUFFIXES)}); `diffalign sample PIPELINE --pairs --reward NAME` writes some"
        if path.suffix not in PAIR_SUFFIXES:
            return f"has another suffix: {told}"
        return None if path.is_file() else f"does not exist: {told}"
    if key == "sft.images":
        told = "give a .jsonl with file and prompt a line; `diffalign sample PIPELINE --out FOLDER` writes one"
        listed = value.endswith(DRAWN[key]) and Path(value).is_file()  # and not one of prompts that ships
        return None if listed else f"is no list of images: {told}"
    if key == "resume_from_checkpoint":
        return None if path.is_dir() else "is no folder: give a folder such as RUN/checkpoints/step-000010, or latest"
    if not path.is_file():
        return f"does not exist: give prompts:NAME, or a file of prompts ({', '.join(PROMPT_SUFFIXES)})"
    told = f"has the suffix '{path.suffix}': prompts are {', '.join(PROMPT_SUFFIXES)}"
    return None if path.suffix in PROMPT_SUFFIXES else told


def _wrong_pipeline(folder: Path) -> str | None:
    if not folder.is_dir():
        return "is no folder: give zoo:NAME, a folder with a model_index.json, or a hub id such as owner/name"
    if not (folder / "model_index.json").is_file():
        return "is no diffusers pipeline: model_index.json is missing"
    name, known = pipeline_index(folder).get("_class_name"), pipeline_classes()
    if name is not None and known and name not in known:
        return f"is a {name}, which belongs to no known family: use one of {', '.join(known)}"
    return None


def pipeline_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of its class and its parts; empty where it says nothing that can be read."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def pipeline_classes() -> list[str]:
    """The classes that can be wrapped, those of loaded plug-ins too; none where one that is not loaded may add some."""
    if entry_points(group="diffalign.policies"):
        return []
    registry = getattr(sys.modules.get("diffalign.policies"), "POLICIES", None)
    loaded = [registry.get(name).pipeline_class for name in registry.names()] if registry is not None else []
    return sorted({*PIPELINES, *loaded})


def _wrong_reward(name: str) -> str | None:
    if _is_reward_file(name):
        return None if Path(name).is_file() else "does not exist: give a reward's name, or the file of a reward recipe"
    known = reward_names()
    return None if name.casefold() in known else f"is no known reward: {suggest(name, known)}"


def reward_names() -> list[str]:
    """Every reward by name, without importing one: recipes that ship, entry points, what a plug-in registered."""
    names = {path.stem for path in data_root("rewards").glob("*.yaml")}
    names |= {entry.name.casefold() for entry in entry_points(group="diffalign.rewards")}
    loaded = sys.modules.get("diffalign.rewards")
    registry = getattr(loaded, "REWARDS", None)
    return sorted(names | set(registry.names() if registry is not None else ()))


def content_hashes(tree: dict[str, Any]) -> dict[str, str]:
    """sha256 of every file or folder that a recipe's tree points to, by key; a hub id has its revision instead."""
    hashes = {}
    for key, value in _texts(tree):
        if key.startswith(("report_to", "resume_from")) or (key.startswith("pipeline.") and _HUB_ID.fullmatch(value)):
            continue
        path = data_root("rewards") / f"{value.casefold()}.yaml" if key.startswith("rewards.") else Path(value)
        path = resolve_data(path if _is_reward_file(str(path)) else value, Path.cwd())
        if path.exists():
            hashes[key] = sha256(path)
    return hashes


def sha256(path: Path) -> str:
    """Of a file its sha256; of a folder that of the JSON of its files' relative paths and sha256, in order."""
    if path.is_dir():
        listing = {p.relative_to(path).as_posix(): sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}
        return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
