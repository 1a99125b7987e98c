"""Drawing a request: seeds, batches, progress, and the name of what gave the first NaN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from quest_deploy.config import GenerateConfig, ProgressEvent
from quest_deploy.errors import ConfigError, QuestDeployError
from quest_deploy.model.families import TEXT_ENCODER, VAE_DECODER
from quest_deploy.pipeline import Pipeline
from quest_deploy.pipeline.draw import draw_images, make_jobs

Spoil = Callable[[str, int], None]


def request(**options: object) -> GenerateConfig:
    return GenerateConfig(**{"prompts": ("a", "b"), "steps": 2, "guidance_scale": 3.0} | options)


def draw(pipeline: Pipeline, config: GenerateConfig) -> list[Image.Image]:
    return [drawn.image for drawn in draw_images(pipeline, config, pipeline.make_scheduler(config.scheduler))]


def test_seeds_count_up_over_images_and_prompts() -> None:
    jobs = make_jobs(request(seed=10, num_images=2))
    assert [(job.prompt, job.seed) for job in jobs] == [("a", 10), ("a", 11), ("b", 12), ("b", 13)]


def test_images_come_in_batches_of_the_size_asked_for(pipeline: Pipeline) -> None:
    draw(pipeline, request(num_images=3, batch_size=4, guidance_scale=1.0))
    assert pipeline.engines["unet"].batches == [4, 4, 2, 2]


def test_the_batch_size_does_not_change_the_pictures(pipeline: Pipeline) -> None:
    one, all_at_once = (draw(pipeline, request(num_images=2, batch_size=size)) for size in (1, 4))
    for single, batched in zip(one, all_at_once, strict=True):
        # It may change the last bits of a convolution, hence the rounding of a pixel.
        assert np.abs(np.asarray(single, int) - np.asarray(batched, int)).max() <= 1


def test_a_batch_does_not_change_the_noise_of_later_steps(pipeline: Pipeline) -> None:
    config = request(scheduler="euler-ancestral", batch_size=2)
    last = draw(pipeline, config)[1]
    alone = draw(pipeline, request(scheduler="euler-ancestral", prompts=("b",), seed=1))[0]
    assert np.abs(np.asarray(last, int) - np.asarray(alone, int)).max() <= 1


def test_progress_ends_at_the_total_even_where_steps_take_two_passes(pipeline: Pipeline) -> None:
    events: list[ProgressEvent] = []
    config = request(num_images=3, batch_size=4, steps=3, scheduler="heun")
    list(draw_images(pipeline, config, pipeline.make_scheduler("heun"), events.append))
    assert [event.completed for event in events] == [4, 8, 12, 16, 20, 22, 24, 26, 28, 30]
    assert {event.total for event in events} == {30}


@pytest.mark.parametrize(
    ("component", "call", "message"),
    [
        (TEXT_ENCODER, 0, "^text_encoder gave NaN"),
        ("unet", 0, r"^unet at step 1 \(timestep 501\) gave NaN"),
        ("unet", 1, r"^unet at step 2 \(timestep 1\) gave NaN"),
        (VAE_DECODER, 0, "^vae_decoder gave NaN"),
    ],
)
def test_the_first_nan_is_named(
    pipeline: Pipeline, spoil: Spoil, component: str, call: int, message: str
) -> None:
    spoil(component, call)
    with pytest.raises(QuestDeployError, match=message):
        draw(pipeline, request())


def test_too_few_steps_are_refused_before_anything_runs(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="PNDMScheduler cannot make a schedule of 2 steps"):
        draw(pipeline, request(scheduler="pndm"))
    assert pipeline.engines[TEXT_ENCODER].batches == []
