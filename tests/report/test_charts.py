"""Curves: which are drawn from which rows, what the points are, and that the page's style reaches them."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from diffalign.report.charts import curves, read_metrics, smooth


def rows(steps=31):
    for step in range(steps):
        row = {"step": step, "grad_norm": float(step), "heldout/none": None, "kl": 0.0}
        yield row | ({"heldout/other": 1.0, "validation/clip": step / 100} if step % 10 == 0 else {"reward/clip": 0.1})


def test_one_chart_for_each_quantity_that_is_there():
    found = {chart.key for chart in curves(list(rows()))}
    assert found == {"reward/clip", "heldout/other", "grad_norm"}  # kl is zero throughout, `none` has no numbers
    held = [{"step": s, "weight_l2": 0.1 * s, "sft": 1 - 0.1 * s, "prediction_mse": 0.1 * s} for s in range(4)]
    assert [chart.key for chart in curves(held)] == ["prediction_mse", "weight_l2", "sft"]
    with_oracle = [row | ({"heldout/my-oracle": 0.5} if row["step"] % 10 == 0 else {}) for row in rows()]
    titles = [chart.title for chart in curves(with_oracle)]
    assert "my-oracle against clip" in titles
    assert curves([]) == []
    assert curves([{"step": 0, "reward/clip": 1.0}]) == []


def test_points_lie_where_the_numbers_are():
    """Of a quadratic, the first differences in the SVG stand as 1 : 3 : 5."""
    chart = curves([{"step": s, "heldout/square": s**2} for s in range(4)])[0]
    paths = [re.findall(r"(-?[\d.]+) (-?[\d.]+)", path) for path in re.findall(r' d="(M[^"]*)"', chart.svg)]
    points = np.array(next(path for path in paths if len(path) == 4), dtype=float)
    right, up = np.diff(points, axis=0).T * [[1], [-1]]  # y grows downwards
    np.testing.assert_allclose(right, right[0], rtol=1e-4)
    np.testing.assert_allclose(up / up[0], [1, 3, 5], rtol=1e-4)
    assert min(right[0], up[0]) > 0


def test_charts_are_well_formed_and_take_the_colours_of_the_page():
    for chart in curves(list(rows())):
        ElementTree.fromstring(chart.svg)
        assert "var(--line-" in chart.svg
        assert not re.search(r"#0[1-9a-e]0[1-9a-e]0[1-9a-f]", chart.svg)
        assert chart.svg.startswith("<svg")
        assert 'role="img"' in chart.svg
        assert "DOCTYPE" not in chart.svg


def test_names_may_hold_anything():
    odd = "a<b>&$x_1$"
    data = [
        {"step": s, f"reward/{odd}": s * 1.0, f"validation/{odd}": s * 1.0, "heldout/oracle": 1.0} for s in range(5)
    ]
    charts = curves(data)
    assert len(charts) == 3
    for chart in charts:
        ElementTree.fromstring(chart.svg)


def test_smoothing_keeps_constants_and_the_middle_of_lines():
    np.testing.assert_allclose(smooth(np.full(50, 3.0)), 3.0)
    line = np.arange(100.0)
    np.testing.assert_allclose(smooth(line)[10:-10], line[10:-10])
    assert len(smooth(np.array([1.0, 2.0]))) == 2


def test_metrics_files(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []
    (tmp_path / "m.jsonl").write_text('{"step": 0}\n\n{"step": 1}\n')
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [0, 1]
    (tmp_path / "m.jsonl").write_text('{"step": 0}\n{"step":')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2"):
        read_metrics(tmp_path / "m.jsonl")
