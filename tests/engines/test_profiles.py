from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quest_deploy.config import BuildConfig, ShapeRange
from quest_deploy.engines.profiles import (
    InputRange,
    Profile,
    component_profiles,
    limits_of,
    select_profile,
)
from quest_deploy.errors import ArtifactError, ConfigError, EngineInputError
from quest_deploy.model.spec import component_specs


def ranges(low: int, best: int, high: int) -> ShapeRange:
    return ShapeRange(min=low, opt=best, max=high)


def flat(low: int, best: int, high: int) -> dict[str, InputRange]:
    return {"sample": InputRange(min=(low, 4), opt=(best, 4), max=(high, 4))}


def test_static_shapes_are_the_optimal_ones_with_both_branches_of_guidance(model_dir: Path) -> None:
    config = BuildConfig(batch=ranges(1, 2, 4), height=ranges(16, 16, 32), static=True)
    profiles = component_profiles(model_dir, config)
    sample = profiles["unet"]["sample"]
    assert sample.min == sample.opt == sample.max and sample.opt[0] == 4
    decoded = profiles["vae_decoder"]["latent_sample"]
    assert decoded.min == decoded.max and decoded.max[0] == 2
    # A prompt is encoded alone, or with its negative one.
    assert profiles["text_encoder"]["input_ids"].min[0] == 1


def test_a_batch_that_guidance_doubles_beyond_32_bits_is_refused(model_dir: Path) -> None:
    batch = ShapeRange(min=1, opt=1, max=2_000_000_000)
    with pytest.raises(ConfigError, match=r"at most 2147483647.*guidance doubles a batch.*fewer images"):
        component_profiles(model_dir, BuildConfig(batch=batch))


def test_denoiser_batch_is_twice_the_images_except_the_smallest(model_dir: Path) -> None:
    sample = component_profiles(model_dir, BuildConfig(batch=ranges(1, 2, 4)))["unet"]["sample"]
    assert (sample.min[0], sample.opt[0], sample.max[0]) == (1, 4, 8)


def test_vae_batch_is_the_images(model_dir: Path) -> None:
    latents = component_profiles(model_dir, BuildConfig(batch=ranges(1, 2, 4)))["vae_decoder"][
        "latent_sample"
    ]
    assert (latents.min[0], latents.opt[0], latents.max[0]) == (1, 2, 4)


def test_text_encoder_takes_one_prompt_up_to_prompts_and_negatives(model_dir: Path) -> None:
    ids = component_profiles(model_dir, BuildConfig(batch=ranges(2, 2, 4)))["text_encoder"]["input_ids"]
    assert (ids.min, ids.max) == ((1, 8), (8, 8))


def test_timestep_is_one_or_one_for_each_sample(model_dir: Path) -> None:
    steps = component_profiles(model_dir, BuildConfig(batch=ranges(1, 1, 4)))["unet"]["timestep"]
    assert (steps.min, steps.max) == ((1,), (8,))


def test_text_has_the_tokenizer_s_length_alone(model_dir: Path) -> None:
    text = component_profiles(model_dir, BuildConfig())["unet"]["encoder_hidden_states"]
    assert text.min[1:] == text.opt[1:] == text.max[1:] == (8, 16)


def test_text_may_have_other_lengths_that_hold_the_tokenizer_s(model_dir: Path) -> None:
    (own,) = {edge[1] for edge in edges(component_profiles(model_dir, BuildConfig()))}
    config = BuildConfig(sequence=ranges(1, own, 2 * own))
    assert [edge[1] for edge in edges(component_profiles(model_dir, config))] == [1, own, 2 * own]
    with pytest.raises(ConfigError, match=f"got {own + 1}..{own + 1} text tokens, but .* prompts have {own}"):
        component_profiles(model_dir, BuildConfig(sequence=ranges(own + 1, own + 1, own + 1)))


def edges(profiles: dict[str, Profile]) -> list[tuple[int, ...]]:
    """Smallest, optimal and largest shape of the text embeddings."""
    text = profiles["unet"]["encoder_hidden_states"]
    return [text.min, text.opt, text.max]


def test_without_a_size_latents_have_the_model_s_own(model_dir: Path) -> None:
    sample = component_profiles(model_dir, BuildConfig())["unet"]["sample"]
    assert sample.min[2:] == sample.opt[2:] == sample.max[2:] == (8, 8)


def test_latents_are_pixels_over_the_vae_scale_factor(model_dir: Path) -> None:
    config = BuildConfig(height=ranges(8, 16, 32), width=ranges(16, 16, 64))
    sample = component_profiles(model_dir, config)["unet"]["sample"]
    assert (sample.min[2:], sample.opt[2:], sample.max[2:]) == ((4, 8), (8, 8), (16, 32))


def test_size_that_the_unet_cannot_halve_is_refused_with_sizes_to_choose(model_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"height: got 18 pixels, expected multiples of 4 .* choose 16 or 20"
    ):
        component_profiles(model_dir, BuildConfig(height=ranges(16, 18, 20)))


def test_every_bad_size_is_named(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="width: got 6, 17 pixels"):
        component_profiles(model_dir, BuildConfig(width=ranges(6, 16, 17)))


def test_size_below_one_multiple_offers_no_zero(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="choose 4$"):
        component_profiles(model_dir, BuildConfig(height=ranges(2, 4, 4)))


def test_missing_configuration_is_an_artifact_error(model_dir: Path) -> None:
    (model_dir / "unet" / "config.json").unlink()
    with pytest.raises(ArtifactError, match="config.json"):
        component_profiles(model_dir, BuildConfig())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 9), min_size=3, max_size=3), guided=st.booleans(), data=st.data())
def test_every_image_batch_in_range_fits_with_and_without_guidance(
    model_dir: Path, sizes: list[int], guided: bool, data: st.DataObject
) -> None:
    low, best, high = sorted(sizes)
    images = data.draw(st.integers(low, high))
    profile = component_profiles(model_dir, BuildConfig(batch=ranges(low, best, high)))["unet"]
    batch = 2 * images if guided else images
    shapes = {"sample": (batch, 4, 8, 8), "timestep": (batch,), "encoder_hidden_states": (batch, 8, 16)}
    assert select_profile("unet", [profile], shapes) == 0


def test_limits_span_all_profiles(model_dir: Path) -> None:
    spec = component_specs(model_dir)["unet"]
    small = component_profiles(model_dir, BuildConfig(batch=ranges(1, 1, 1)))["unet"]
    large = component_profiles(model_dir, BuildConfig(batch=ranges(2, 2, 4), height=ranges(16, 16, 32)))[
        "unet"
    ]
    limits = limits_of(spec, [small, large])
    assert (limits["batch"], limits["height"], limits["width"]) == ((1, 8), (8, 16), (8, 8))


@pytest.mark.parametrize(("batch", "chosen"), [(1, 0), (3, 0), (6, 1), (8, 1)])
def test_nearest_optimum_is_selected(batch: int, chosen: int) -> None:
    profiles = [flat(1, 2, 8), flat(1, 8, 8)]
    assert select_profile("unet", profiles, {"sample": (batch, 4)}) == chosen


def test_profile_that_does_not_hold_the_shape_is_not_selected() -> None:
    assert select_profile("unet", [flat(1, 4, 4), flat(5, 8, 8)], {"sample": (5, 4)}) == 1


@pytest.mark.parametrize("shape", [(9, 4), (4, 5), (4,)])
def test_shape_outside_all_profiles_is_refused_with_what_is_allowed(shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineInputError, match=r"unet: got sample .* allows sample \[1, 4\]\.\.\[8, 4\]"):
        select_profile("unet", [flat(1, 2, 8)], {"sample": shape})
