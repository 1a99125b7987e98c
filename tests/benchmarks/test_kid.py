from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from torchmetrics.image.kid import poly_mmd

from benchmarks import ablation, kid
from benchmarks.baselines.rows import ROWS
from benchmarks.encoder import FEATURES, Encoder, features_of, load_encoder
from benchmarks.settings import ROOT, Settings
from quest_deploy.quantize.recipe import load_recipe


def closed_form(x: torch.Tensor, y: torch.Tensor) -> float:
    """The sum of its definition, over all pairs of two prompts."""
    total, n = 0.0, len(x)
    for i in range(n):
        for j in range(n):
            if i != j:
                a, b, c, d = (
                    float((p @ q / x.shape[1] + 1) ** 3)
                    for p, q in ((x[i], x[j]), (y[i], y[j]), (x[i], y[j]), (x[j], y[i]))
                )
                total += a + b - c - d
    return total / (n * (n - 1))


def test_distance_is_the_unbiased_one_of_the_cubic_kernel() -> None:
    x, y = torch.randn(64, 5).double(), torch.randn(64, 5).double() + 0.3
    whole, without = kid.jackknife(x, y)
    assert whole == pytest.approx(closed_form(x, y), rel=1e-9)
    left = torch.arange(64) % kid.GROUPS != 3
    assert float(without[3]) == pytest.approx(closed_form(x[left], y[left]), rel=1e-9)


def test_pictures_of_one_prompt_that_are_alike_do_not_make_the_distance_negative() -> None:
    """As full precision's are like the real ones, of which it has seen all."""
    prompts = 3 * torch.randn(256, 8)
    x, y = (prompts + 0.1 * torch.randn(256, 8) for _ in range(2))
    found = kid._interval(*kid.jackknife(x, y))
    assert found["low"] < 0 < found["high"]
    assert kid.SCALE * float(poly_mmd(x.double(), y.double())) < found["low"]


def test_interval_of_a_mean_is_the_usual_one() -> None:
    """Of a statistic that is a mean over groups, the jackknife gives the standard error of the mean."""
    values = torch.randn(kid.GROUPS).double()
    without = (values.sum() - values) / (kid.GROUPS - 1)
    found = kid._interval(float(values.mean()), without)
    reach = 2.0395 * float(values.std()) / kid.GROUPS**0.5
    assert found["high"] - found["low"] == pytest.approx(2 * reach * kid.SCALE, abs=2e-3)


def test_the_same_distribution_is_at_no_distance_and_another_is() -> None:
    real, same, other = torch.randn(256, 8), torch.randn(256, 8), torch.randn(256, 8) * 1.5
    near, far = (kid._interval(*kid.jackknife(real, drawn)) for drawn in (same, other))
    assert near["low"] < 0 < near["high"]
    assert far["low"] > 0


def test_committed_encoder_prompts_and_features_belong_together() -> None:
    prompts = kid.PROMPTS.read_text(encoding="utf-8").splitlines()
    features = load_file(kid.REAL)["features"].float()
    assert features.shape == (len(prompts), FEATURES)
    assert len(prompts) >= 2048
    # Standardized over exactly these pictures.
    assert torch.allclose(features.mean(0), torch.zeros(FEATURES), atol=0.02)
    assert torch.allclose(features.std(0), torch.ones(FEATURES), atol=0.02)
    found = features_of(load_encoder(), torch.full((2, 3, 64, 64), 255, dtype=torch.uint8))
    assert found.shape == (2, FEATURES)
    assert bool(found.isfinite().all())


def test_standardized_features_have_unit_variance() -> None:
    encoder, pictures = Encoder(), torch.randint(256, (64, 3, 64, 64), dtype=torch.uint8)
    encoder.standardize(pictures)
    features = features_of(encoder, pictures)
    assert torch.allclose(features.std(0), torch.ones(FEATURES), atol=1e-3)
    assert torch.allclose(features.mean(0), torch.zeros(FEATURES), atol=1e-4)


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_a_variant_changes_what_its_name_says_and_has_the_same_bits(name: str) -> None:
    recipe = load_recipe(ablation.RECIPE)
    base, made = ablation.variant(recipe, "short"), ablation.variant(recipe, name)
    assert (made.weight_bits, made.activation_bits) == (recipe.weight_bits, recipe.activation_bits)
    changed = {field for field in vars(made) if getattr(made, field) != getattr(base, field)}
    # Softmax is quantized beside the other operands of attention alone.
    differences = changed - {"name", "softmax_bits"}
    if name == "own-trajectories-no-walks":
        assert differences == {"on_policy_prompts", "walk_share"}
    else:
        assert len(differences) == (name != "short")
    assert ("softmax_bits" in changed) == ("softmax" in name)
    # Checkpoints of all rows lie in one folder, by name.
    assert name not in {*ROWS, "start"}


def test_pictures_of_other_code_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    opened: list[Path] = []

    @contextlib.contextmanager
    def white(path: Path, **options: str) -> Iterator[MagicMock]:
        opened.append(path)
        yield MagicMock(**{"decode.return_value": torch.ones(1, 3, 64, 64)})

    monkeypatch.setattr("quest_deploy.pipeline.load_pipeline", white)
    for code in ("one", "one", "other"):
        monkeypatch.setattr(kid, "made_by", lambda sources, code=code: {"code": code})
        assert kid.draw_features(Settings(quick=True), "fp32", tmp_path, ["rocket"]).shape == (1, FEATURES)
    assert len(opened) == 2


MIN_MAX = """
import sys
from benchmarks import kid
from benchmarks.settings import Settings
settings = Settings(recipes=("w4a8",), quick=True)
assert (kid._minmax(settings, "w4a8", settings.work) / "manifest.json").is_file()
assert "torch" not in sys.modules
"""


@pytest.mark.thorough
def test_torch_is_not_loaded_before_rows_are_exported(tmp_path: Path) -> None:
    (tmp_path / "reference-model").symlink_to(ROOT / "reference-model")
    script = tmp_path / "script.py"
    script.write_text(
        f"if __name__ == '__main__':\n    {MIN_MAX.strip().replace(chr(10), chr(10) + '    ')}\n"
    )
    subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
