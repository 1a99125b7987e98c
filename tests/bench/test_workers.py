"""What the processes that measure are started with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quest_deploy.bench import stage
from quest_deploy.bench.subject import Subject
from quest_deploy.config import BenchConfig, Provider, RunConfig


@pytest.mark.parametrize(("provider", "override"), [("tensorrt", "0"), ("cuda", None), (None, None)])
def test_no_runtime_rounds_to_tensor_float(
    monkeypatch: pytest.MonkeyPatch, provider: Provider | None, override: str | None
) -> None:
    """ONNX Runtime has no option for its TensorRT provider, and every other row multiplies float32 as it is."""
    started: list[dict[str, str]] = []

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> SimpleNamespace:
        started.append(env)
        return SimpleNamespace(returncode=0, stdout="{}\n", stderr="")

    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    monkeypatch.setattr(stage.subprocess, "run", run)
    subject = Subject(
        label="onnx", path=Path("onnx"), backend="onnxruntime", run=RunConfig(provider=provider)
    )
    assert stage.measure(subject, BenchConfig()) == {}
    assert [env.get("NVIDIA_TF32_OVERRIDE") for env in started] == [override]
