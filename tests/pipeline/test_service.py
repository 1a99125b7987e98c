"""What a server asks of a pipeline: bad requests, cancelled ones, and a process that is not its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quest_deploy.errors import ConfigError, EngineRunError
from quest_deploy.pipeline import Pipeline
from quest_deploy.sampling import Step, initial_noise


def draw(pipeline: Pipeline, seeds: tuple[int, ...] = (0,), **changes: Any) -> Tensor:
    count = len(seeds)
    options = {"steps": 2, "guidance_scale": 3.0, "scheduler": "euler-ancestral"} | changes
    noise, negative = pipeline.initial_noise(seeds), pipeline.encode_negative(count)
    return pipeline.denoise(noise, pipeline.encode(["rocket"] * count), negative, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 2.0}, "expected a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "expected a finite number"),
        ({"generators": [torch.Generator()]}, "1 generators for 2 images"),
        ({"generators": torch.Generator()}, "expected a list of one for each"),
    ],
)
def test_what_the_loop_cannot_do_is_refused(pipeline: Pipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(pipeline, (0, 1), **change)
    assert pipeline.engines["unet"].batches == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("prompts", [[], ["\ud800"], [None]], ids=["none", "no UTF-8", "no text"])
def test_prompts_that_are_none_are_refused(pipeline: Pipeline, prompts: Any) -> None:
    with pytest.raises(ConfigError, match="encode: .*prompt"):
        pipeline.encode(prompts)


def test_a_negative_prompt_that_is_none_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="negative prompt"):
        pipeline.encode_negative(1, "\ud800")


@pytest.mark.parametrize("seeds", [[], [2**64], [-1], [0.5]])
def test_seeds_that_are_none_are_refused(pipeline: Pipeline, seeds: Any) -> None:
    with pytest.raises(ConfigError, match="initial_noise: .*seed"):
        pipeline.initial_noise(seeds)


def test_a_request_that_is_cancelled_leaves_nothing_behind(pipeline: Pipeline) -> None:
    def cancel(step: Step) -> None:
        if step.index == 1:
            raise InterruptedError

    before = draw(pipeline, steps=4)
    with pytest.raises(InterruptedError):
        draw(pipeline, (5, 6), steps=4, callback=cancel)
    assert torch.equal(draw(pipeline, steps=4), before)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AMBIENT = [
    pytest.param(lambda: torch.autocast("cpu", dtype=torch.bfloat16), id="autocast"),
    pytest.param(lambda: default_dtype(torch.float64), id="float64"),
    pytest.param(lambda: default_dtype(torch.bfloat16), id="bfloat16"),
    pytest.param(torch.inference_mode, id="inference"),
]


@pytest.mark.parametrize("ambient", AMBIENT)
def test_what_the_process_has_set_draws_no_other_picture(pipeline: Pipeline, ambient: Any) -> None:
    expected = pipeline.decode(draw(pipeline))
    with ambient():
        image = pipeline.decode(draw(pipeline))
    assert torch.equal(image, expected)


def test_noise_is_of_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        noise = initial_noise([3], (4, 2, 2))
    assert torch.equal(noise, initial_noise([3], (4, 2, 2)))


def test_a_fork_of_a_process_that_has_drawn_is_told(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads of torch are gone, and whoever waits for them waits for ever."""
    draw(pipeline)
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for call in (lambda: draw(pipeline), lambda: pipeline.decode(torch.zeros(1, 4, 8, 8))):
        with pytest.raises(EngineRunError, match="forked"):
            call()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    draw(pipeline)
