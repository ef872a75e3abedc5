"""The house: an import only points down, functions fit on a screen, files hold one idea."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffalign"

# Lowest first; modules of one floor may import each other.
FLOORS = (
    ("noise", "ledger", "registry", "settings", "recipe_file", "versions", "_compat", "processes", "laws", "media"),
    ("policies", "rewards", "data"),
    ("rollout",),
    ("finetune", "search"),
    ("recipe_problems", "recipe_references", "config", "search_recipe"),
    ("engine", "report", "scoring"),
    ("zoo",),
    ("cli", "__main__"),
)
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}

FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
SCREEN, FILE = 60, 350


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def ids(path):
    return path.relative_to(PACKAGE).as_posix()


def floor_of(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "diffalign" and len(parts) > 1 else None


def imports(path):
    """(module, line) of every import, those inside functions and under TYPE_CHECKING included."""
    package = ("diffalign", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join((*package[: len(package) - node.level + 1], node.module or "")).strip(".")
                if node.level
                else node.module
            )
            yield base, node.lineno
            if base == "diffalign":
                yield from ((f"diffalign.{alias.name}", node.lineno) for alias in node.names)


def own_floor(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=ids)
def test_imports_point_down(path):
    own = own_floor(path)
    if own == "__init__":  # the top level names everything, lazily
        return
    assert own in HEIGHT, f"{own} stands on no floor: add it to FLOORS"
    for module, line in imports(path):
        other = floor_of(module)
        if other is None or other == own:
            continue
        assert other in HEIGHT, f"{path.name}:{line} imports {module}, which stands on no floor"
        assert HEIGHT[other] <= HEIGHT[own], f"{path.name}:{line} imports {module}, a higher floor"
        assert {own, other} != {"finetune", "search"}, f"{path.name}:{line}: finetune and search stay apart"


def test_laws_know_torch_only():
    allowed = {"torch", "diffalign", *sys.stdlib_module_names}
    for path in (PACKAGE / "laws").rglob("*.py"):
        for module, line in imports(path):
            assert module.split(".")[0] in allowed, f"{path.name}:{line} imports {module}"
            assert floor_of(module) in (None, "laws"), f"{path.name}:{line} imports {module}"


def test_methods_know_no_reward_and_no_family():
    concrete = ("diffalign.rewards.", "diffalign.policies.")
    for path in (PACKAGE / "finetune").rglob("*.py"):
        for module, line in imports(path):
            assert not module.startswith(concrete), f"{path.name}:{line} imports {module}; take it from the package"


@pytest.mark.parametrize("path", modules(), ids=ids)
def test_no_pickle_and_no_eval(path):
    for module, line in imports(path):
        assert module.split(".")[0] not in FORBIDDEN, f"{path.name}:{line} imports {module}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.save"), f"{path.name}:{node.lineno} calls {called}"
            if called == "torch.load":  # of published checkpoints that exist as torch files only
                assert path == PACKAGE / "rewards" / "weights.py", f"{path.name}:{node.lineno} calls {called}"
                assert "weights_only=True" in ast.unparse(node), f"{path.name}:{node.lineno} may unpickle anything"


@pytest.mark.parametrize("path", modules(), ids=ids)
def test_functions_fit_on_a_screen_and_files_hold_one_idea(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= FILE, f"{path.name} has {text.count(chr(10))} lines: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= SCREEN, f"{path.name}:{node.lineno} {node.name} has {length} lines: split it"
