"""Several processes that finetune one model together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quest_deploy.errors import ConfigError, MissingDependencyError
from quest_deploy.quantize.parallel import ALONE, Workers, device_of, find_workers


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """One process, and two that share every update."""
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("data_parallel.py"),
            tiny_model,
            tmp_path_factory.mktemp("runs"),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.thorough
def test_two_processes_have_the_losses_of_one_at_the_same_batch(runs: dict[str, Any]) -> None:
    one, two = runs["losses"]
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.thorough
def test_only_the_main_process_writes(runs: dict[str, Any]) -> None:
    assert runs["statuses"] == [0, 0, 0]
    assert runs["left"] == ["one", "one.json", "two", "two.json"]


def test_one_process_has_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_workers("cpu") is ALONE
    assert ALONE.sum(0.5) == 0.5


class Another:
    """Accelerate where one more process has no gradients at all."""

    device = torch.device("cpu")

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return value.clone()


def test_gradients_that_no_process_has_stay_none() -> None:
    """As with one process, whose Adam leaves such parameters alone."""
    seen, unseen = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    gradient = torch.arange(6.0).reshape(2, 3)
    seen.grad = gradient.clone()
    assert Workers(0, 2, Another()).sum_gradients([unseen, seen], 0.5) == 0.5
    assert unseen.grad is None
    assert torch.equal(seen.grad, gradient)


def test_several_processes_without_accelerate_are_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'quest-deploy\[multi-gpu\]'"):
        find_workers("cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is cuda:1, and this PyTorch sees no GPU"):
        device_of("cuda:1", ALONE)
