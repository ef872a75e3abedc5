"""The report as a browser gets it: whole, self-contained, escaped, and with the right numbers in the right places."""

import base64
import io
import math
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffalign import report
from diffalign.report.page import FigureView, _places

VOID = {"meta", "img", "br", "link", "path", "use"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps text, attributes and the <script> elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.text, self.attributes, self.scripts = [], [], [], 0
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(run_with_metrics):
    folder, summary = run_with_metrics
    path = report.write_report(folder, summary)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_loads_nothing_from_elsewhere(page):
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#"))
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")


def test_curves_are_in_the_page(page):
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert "clip, trained on" in labels
    assert "shapes-oracle against clip" in labels


def test_prompts_and_titles_are_escaped(page):
    assert page.scripts == 1  # the copy button's own
    text = "".join(page.text)
    assert '<script>alert("x")</script> & more' in text
    assert "shapes <tuned>" in text


def test_figures_stand_with_their_intervals(page):
    text = " ".join(page.text)
    assert "+1.000 " in text  # every difference is one, so the interval has no width
    assert "points" in text
    assert "one prompt only" in text
    assert "76,800" in text
    assert "9 min 12 s" in text
    assert "2.00 GiB" in text


def test_images_are_the_pixels_that_were_saved(run_with_metrics, page):
    folder, summary = run_with_metrics
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == 6
    shown = Image.open(io.BytesIO(base64.b64decode(sources[1].split(",")[1])))
    assert shown.size == (256, 256)
    assert np.array_equal(np.asarray(shown)[::16, ::16], np.asarray(Image.open(folder / summary.gallery[0].tuned)))


def test_the_snippet_is_python_that_names_the_lora(run_with_metrics, page):
    code = next(text for text in page.text if "load_lora_weights" in text)
    compile(code, "snippet", "exec")
    assert repr(str(run_with_metrics[0] / "lora")) in code
    assert "num_inference_steps=20, guidance_scale=3.0" in code


def test_the_command_survives_the_space_in_the_path(run_with_metrics, page):
    words = shlex.split(next(text for text in page.text if text.startswith("diffalign sample")))
    assert words[2] == str(run_with_metrics[0] / "config.yaml")
    assert words[words.index("--prompts") + 1] == "prompts:test"


def test_a_shipped_pipeline_is_named_as_diffusers_reads_it(tmp_path, monkeypatch):
    model = tmp_path / "assets" / "zoo" / "tiny"
    model.mkdir(parents=True)
    monkeypatch.setattr("diffalign.registry.data_root", lambda folder="assets": tmp_path / folder)
    html = report.write_report(tmp_path, report.Summary(title="t", pipeline="zoo:tiny")).read_text()
    assert f"from_pretrained(&#39;{model}&#39;)" in html


def test_summary_comes_back_as_it_was(run):
    folder, summary = run
    summary.save(folder)
    again = report.Summary.load(folder)
    assert "NaN" not in (folder / "summary.json").read_text()
    assert repr(again) == repr(summary)  # NaN differs from itself, its text does not
    before = report.write_report(folder).read_bytes()
    assert report.write_report(folder, summary).read_bytes() == before


def test_a_bare_run_still_has_a_page(tmp_path):
    html = report.write_report(tmp_path, report.Summary(title="bare", pipeline="p")).read_text()
    Page(html)
    assert "<svg" not in html
    assert not (tmp_path / "grid.png").exists()


def test_what_is_missing_is_named(run):
    folder, summary = run
    (folder / "base-1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"base-1\.png"):
        report.write_report(folder, summary)
    (folder / "summary.json").write_text('{"title": "x"}')
    with pytest.raises(ValueError, match="not the summary of a run"):
        report.write_report(folder)


def test_many_pairs_fold_away(run):
    folder, summary = run
    many = report.Summary(title="t", pipeline="p", gallery=summary.gallery * 7)
    html = report.write_report(folder, many).read_text()
    assert "9 more pairs" in html
    assert len(re.findall("<img", html)) == 42


@pytest.mark.parametrize(("half_width", "places"), [(0.0062, 4), (0.15, 2), (4.9, 1), (49, 0), (0, 3), (math.nan, 3)])
def test_digits_follow_the_uncertainty(half_width, places):
    assert _places(half_width) == places


def test_bars_have_zero_in_the_middle():
    figure = report.Figure("r", "heldout", 1.0, 0.8, -0.2, -0.3, -0.1, 50)
    view = FigureView.of(figure)
    low, high, point = view.bar
    assert view.verdict == "down"
    assert 0 < low < point < high < 50
    np.testing.assert_allclose((point - low) / (50 - point), 0.1 / 0.2)
    assert view.difference == "\N{MINUS SIGN}0.20"
    assert FigureView.of(report.Figure("r", "oracle", 0.5, 0.52, 0.02, -0.01, 0.05, 50, "%")).verdict == "flat"
