"""The exit code of parity is its verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from quest_deploy.commands import main


@pytest.mark.parametrize(
    ("noise_snr_db_min", "code", "verdict"), [(-100.0, 0, "passed"), (100.0, 3, "failed")]
)
def test_exit_code_says_whether_the_budget_is_kept(
    noise_snr_db_min: float, code: int, verdict: str, tmp_path: Path, tiny_model: Path, tiny_checkpoint: Path
) -> None:
    budget = tmp_path / "budget.yaml"
    budget.write_text(f"noise_snr_db_min: {noise_snr_db_min}\n")
    words = ["parity", tiny_model, tiny_checkpoint, "-o", tmp_path / "out", "--budget", budget, "--json"]
    done = CliRunner().invoke(main, [*map(str, words), "--steps", "2", "--num-prompts", "1"])
    assert done.exit_code == code, done.stderr
    assert json.loads(done.stdout)["verdict"] == verdict
    assert (tmp_path / "out" / "report.html").exists()


def test_notes_are_printed(tmp_path: Path, tiny_model: Path, tiny_checkpoint: Path) -> None:
    budget = tmp_path / "budget.yaml"
    budget.write_text("{}")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rocket\n")
    words = ["parity", tiny_model, tiny_checkpoint, "-o", tmp_path / "out", "--budget", budget]
    words += ["--prompts", prompts]
    done = CliRunner().invoke(main, [*map(str, words), "--steps", "2", "--num-prompts", "3"])
    assert done.exit_code == 0, done.stderr
    assert "prompts: 1 instead of 3, the list has no more" in done.stdout
    assert "only NaN and infinity were checked; give --budget" in done.stdout
