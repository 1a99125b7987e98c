"""Pipelines around the tiny model, and around engines that say what they were asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quest_deploy.model.spec import ComponentSpec
from quest_deploy.pipeline import Pipeline, load_pipeline


class Recorder:
    """Wraps an engine: keeps the batch of every call, and lets a test change the outputs."""

    def __init__(self, engine: object, change: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        self.engine, self.change = engine, change
        self.spec: ComponentSpec = engine.spec
        self.batches: list[int] = []

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.batches.append(len(inputs[self.spec.inputs[0].name]))
        return {name: self.change(value) for name, value in self.engine(**inputs).items()}

    def close(self) -> None:
        """Leave the shared engine open."""


@pytest.fixture(scope="session")
def shared_pipeline(tiny_model: Path) -> Iterator[Pipeline]:
    with load_pipeline(tiny_model) as pipeline:
        yield pipeline


@pytest.fixture
def pipeline(shared_pipeline: Pipeline) -> Pipeline:
    """The tiny model on torch, with recorders in place of its engines."""
    engines = {name: Recorder(engine) for name, engine in shared_pipeline.engines.items()}
    return dataclasses.replace(shared_pipeline, engines=engines, _told=set())


@pytest.fixture
def spoil(pipeline: Pipeline) -> Callable[[str, int], None]:
    """Makes a component of `pipeline` answer with a NaN from its n-th call on."""

    def make(component: str, call: int) -> None:
        recorder = pipeline.engines[component]
        recorder.change = lambda value: (
            torch.full_like(value, torch.nan) if len(recorder.batches) > call else value
        )

    return make
