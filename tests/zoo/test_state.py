"""A tree comes back exactly as it was."""

import pytest
import torch

from diffalign.engine.state import load_tree, save_tree


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_round_trip(tmp_path):
    base = torch.arange(6.0)
    tree = {
        "view": base[::2],
        "same storage": [base[:3], base[:3]],
        "a/b": {0: torch.tensor(1.5, dtype=torch.bfloat16), 10: torch.zeros(0, 3)},
        "a": {"b": {"0": torch.tensor([True, False])}},
        "scalars": (None, True, 1, 0.1 + 0.2, float("inf"), "text"),
        "empty": [{}, [], ()],
    }
    save_tree(tmp_path, tree)
    assert same(load_tree(tmp_path), tree)


def test_an_optimizer_comes_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_tree(tmp_path, optimizer.state_dict())
    assert same(load_tree(tmp_path), optimizer.state_dict())


def test_no_tensor_at_all(tmp_path):
    save_tree(tmp_path, {"step": 3})
    assert load_tree(tmp_path) == {"step": 3}


@pytest.mark.parametrize("bad", [{"x": object()}, {1.5: 1}, {"x": {True: 1}}])
def test_what_cannot_come_back_is_refused(tmp_path, bad):
    with pytest.raises(TypeError):
        save_tree(tmp_path, bad)
