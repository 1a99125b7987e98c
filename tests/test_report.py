"""The report page: self-contained, escaped, and honest about what it shows."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quest_deploy.report import (
    MAX_ROWS,
    MAX_SIDE,
    RungImages,
    figure,
    image_grid,
    make_plot,
    png_uri,
    render,
    size_text,
)

EVIL = "<script>alert('x')</script> \"&"


def snr(values: list[Any]) -> dict[str, Any]:
    return {"mean": 30.0, "per_prompt": [30.0], "median": values, "q25": values, "q75": values}


def document(prompts: int = 3, psnr: list[Any] | None = None) -> dict[str, Any]:
    """A report.json with a reference, a checkpoint, an ONNX rung, and an engine that was not run."""
    per_prompt = psnr or [20.0 + number for number in range(prompts)]
    against = {
        "noise_snr_db": snr([30.0, 20.0, 25.0]),
        "noise_cosine": 0.99,
        "image_psnr_db": {"mean": 25.0, "per_prompt": per_prompt},
        "image_ssim": {"mean": 0.9, "per_prompt": [0.9] * prompts},
    }
    common = {
        "digest": "0" * 64,
        "size_bytes": 12_000_000,
        "denoiser_bytes": 9_000_000,
        "status": "run",
        "reason": None,
        "seconds": 1.5,
        "non_finite": None,
        "lineage": None,
        "recipe": "w4a8",
        "backend": "torch",
    }
    gate = {
        "rung": "onnx",
        "kind": "deployment",
        "quantity": "noise SNR, worst step",
        "measured": 110.0,
        "limit": 50.0,
        "at_least": True,
        "unit": "dB",
        "passed": True,
        "detail": EVIL,
    }
    idle = {"status": "not run", "reason": f"no GPU {EVIL}", "seconds": None, "backend": None}
    figures = ("noise_snr_db", "codes", "image_psnr_change_db")
    return {
        "verdict": "incomplete",
        "config": {"guidance_scale": 3.0, "scheduler": None},
        "prompts": [EVIL, *(f"prompt {number}" for number in range(1, prompts))],
        "seeds": list(range(prompts)),
        "timesteps": [900, 500, 100],
        "rungs": [
            {**common, "name": "model", "path": f"/m/{EVIL}", "recipe": None, "against_reference": None},
            {**common, "name": "checkpoint", "path": "/c", "lineage": True, "against_reference": against},
            {**common, "name": "onnx", "path": "/o", "lineage": False, "against_reference": against},
            {**common, **idle, "name": "engines", "path": "/e", "against_reference": None},
        ],
        "edges": [
            {
                "upper": "checkpoint",
                "lower": "onnx",
                "kind": "deployment",
                "noise_snr_db": snr([110.0, "identical", 105.0]),
                "codes": {"layers": [{"layer": EVIL, "places": 10, "differing": 1, "max_difference": 1}]},
                "image_psnr_change_db": {"low": None, "mean": 0.01, "high": None, "median": 0.02},
            },
            {"upper": "onnx", "lower": "engines", "kind": "deployment", **dict.fromkeys(figures)},
        ],
        "gates": [
            gate,
            {**gate, "passed": None, "measured": None},
            {**gate, "kind": "quantization", "passed": False},
        ],
        "budgets": {},
        "notes": [EVIL],
        "environment": {
            "tools": {"torch": EVIL},
            "machine": "x86_64",
            "system": "Linux",
            "cpu_count": 2,
            "torch_threads": 1,
        },
    }


def drawn(prompts: int = 3, side: int = 16) -> list[RungImages]:
    generator = torch.Generator().manual_seed(0)
    return [
        RungImages(name=name, images=torch.rand(prompts, 3, side, side, generator=generator))
        for name in ("model", "checkpoint", "onnx")
    ]


class Page(HTMLParser):
    """Collects the tags of a page and checks that they nest."""

    VOID = ("meta", "img", "line", "br", "path", "col")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def decoded(uri: str) -> np.ndarray:
    data = uri.removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_every_resource_is_inlined() -> None:
    page = Page(render(document(), drawn()))
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"} == set()
    sources = [
        attrs.get("src") or attrs.get("href") for _, attrs in page.tags if {"src", "href"} & attrs.keys()
    ]
    assert len(sources) == 3 * 5 and all(source.startswith("data:image/png;base64,") for source in sources)


def test_no_style_reaches_out() -> None:
    assert not re.search(r"url\(|@import|https?://", render(document(), drawn()))


def test_every_string_of_the_user_is_escaped() -> None:
    text = render(document(), drawn())
    assert "<script" not in text and text.count("&lt;script&gt;") >= 6


def test_tags_nest() -> None:
    assert Page(render(document(), drawn())).open == []


def test_a_rung_that_was_not_run_is_named_with_its_reason() -> None:
    assert "engines was not run:</strong> no GPU" in render(document(), drawn())


def test_verdicts_of_gates_are_told_apart() -> None:
    text = render(document(), drawn())
    assert [text.count(f'class="mark {kind}"') for kind in ("ok", "open", "bad")] == [1, 1, 1]


@pytest.mark.parametrize("verdict", ["passed", "failed", "incomplete"])
def test_the_verdict_stands_in_the_title(verdict: str) -> None:
    assert f"<title>Parity: {verdict}</title>" in render({**document(), "verdict": verdict}, drawn())


def test_a_single_prompt_and_step_can_be_drawn() -> None:
    report = document(prompts=1)
    report["timesteps"] = [900]
    for part in (report["edges"][0], *(rung["against_reference"] for rung in report["rungs"][1:3])):
        part["noise_snr_db"] = snr([12.0])
    assert "denoising step" in render(report, drawn(1))


def test_a_time_is_not_taken_for_a_speed() -> None:
    assert "<code>quest-deploy bench</code> measures speed" in render(document(), drawn())


def test_a_report_without_gates_says_so() -> None:
    assert "no budget applies" in render({**document(), "gates": []}, drawn())


def test_pixels_survive_the_png() -> None:
    image = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0))
    expected = (image * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(decoded(png_uri(image)), expected)


def test_large_pictures_are_scaled_down() -> None:
    assert decoded(png_uri(torch.rand(3, 600, 300))).shape == (MAX_SIDE, MAX_SIDE // 2, 3)


def test_a_picture_with_nan_can_be_shown() -> None:
    assert decoded(png_uri(torch.full((3, 11, 11), float("nan")))).max() == 0


def test_the_difference_is_amplified_four_times() -> None:
    reference = torch.full((3, 3, 16, 16), 0.5)
    rungs = [RungImages(name="model", images=reference), RungImages(name="onnx", images=reference + 0.05)]
    report = document()
    report["rungs"] = [report["rungs"][0], report["rungs"][2]]
    grid = image_grid(report, rungs)
    assert decoded(grid["rows"][0]["cells"][1]["difference"]).tolist() == np.full((16, 16, 3), 51).tolist()


def test_rows_run_from_the_worst_prompt_to_the_best() -> None:
    grid = image_grid(document(4, ["identical", 30.0, None, 20.0]), drawn(4))
    assert [row["seed"] for row in grid["rows"]] == [2, 3, 1, 0]


def test_many_prompts_are_sampled_over_their_ranking() -> None:
    grid = image_grid(document(50), drawn(50))
    seeds = [row["seed"] for row in grid["rows"]]
    assert len(seeds) == MAX_ROWS and seeds[0] == 0 and seeds[-1] == 49 and seeds == sorted(seeds)


def test_a_plot_leaves_gaps_where_there_is_no_figure() -> None:
    plot = make_plot([("onnx", snr([10.0, "identical", None, 20.0]))], [4, 3, 2, 1], {"onnx": 1}, None)
    first, second = plot.lines[0].median[1:].split("M")
    # A point alone is a line to itself, which round ends make a dot.
    for piece in (first, second):
        start, end = piece.split("L")
        assert start == end
    assert plot.lines[0].band.count("Z") == 2 and not plot.lines[0].identical
    plot = make_plot(
        [("onnx", snr([10.0, 20.0, "identical", 20.0, 10.0]))], [5, 4, 3, 2, 1], {"onnx": 1}, None
    )
    assert plot.lines[0].median.count("M") == 2 and plot.lines[0].median.count("L") == 2


def test_a_plot_of_one_step_shows_it() -> None:
    assert make_plot([("onnx", snr([10.0]))], [1], {"onnx": 1}, None).lines[0].median.count("L") == 1


def test_a_plot_of_exact_matches_says_identical() -> None:
    plot = make_plot([("onnx", snr(["identical"] * 3))], [3, 2, 1], {"onnx": 1}, 50.0)
    assert plot.lines[0].identical and plot.lines[0].median == ""


@pytest.mark.parametrize("values", [[10.0, 10.0], [-3.0, 141.7], [0.01, 0.02], [29.9, 31.2]])
def test_a_plot_holds_all_its_points(values: list[Any]) -> None:
    plot = make_plot([("onnx", snr(values))], [2, 1], {"onnx": 1}, None)
    top, bottom = plot.y_ticks[-1][0], plot.y_ticks[0][0]
    heights = [float(point.split(",")[1]) for point in plot.lines[0].median[1:].split("L")]
    assert all(top <= height <= bottom for height in heights) and 2 <= len(plot.y_ticks) <= 8


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "dB", "–"),
        ("identical", "dB", "identical"),
        (31.234, "dB", "31.23 dB"),
        (1e-4, "", "1.0e-04"),
        (0.0, "", "0"),
    ],
)
def test_figures_read_well(value: Any, unit: str, text: str) -> None:
    assert figure(value, unit) == text


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 B"), (12_340, "12.3 kB"), (5_600_000, "5.6 MB"), (7e9, "7.0 GB")]
)
def test_sizes_read_well(size: int, text: str) -> None:
    assert size_text(size) == text
