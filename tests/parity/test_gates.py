"""Gates: what a measured change counts for."""

from __future__ import annotations

from typing import Any

import pytest

from quest_deploy.parity.gates import DeploymentFigures, PsnrChange, deployment_gates, judges_denoiser


@pytest.mark.parametrize(
    ("change", "certain"),
    [
        ({"median": 0.4, "low": -0.1, "high": 0.9}, 0.0),
        ({"median": 0.9, "low": 0.5, "high": 1.2}, 0.5),
        ({"median": -0.9, "low": -1.2, "high": -0.4}, 0.4),
        ({"median": 0.4, "low": float("-inf"), "high": float("inf")}, None),
    ],
    ids=["by luck", "better", "worse", "one prompt"],
)
def test_a_change_of_image_quality_counts_as_far_as_it_is_certain(
    change: dict[str, float], certain: float | None
) -> None:
    assert PsnrChange(mean=0.0, lost=0, prompts=2, **change).certain == certain


@pytest.mark.parametrize(
    ("lost", "prompts", "passes"),
    [
        (1, 16, True),
        (3, 16, True),
        (4, 16, False),
        (11, 16, False),
        (4, 64, True),
        (1, 4, True),
        (2, 2, False),
        (1, 1, None),
    ],
)
def test_a_few_pictures_may_be_lost_to_flipped_codes_and_no_more(
    lost: int, prompts: int, passes: bool | None
) -> None:
    change = PsnrChange(median=0.0, low=-0.1, high=0.1, mean=-1.0, lost=lost, prompts=prompts)
    (gate,) = (
        gate
        for gate in deployment_gates("onnx", figures(psnr_change=change), quantized=True)
        if "lose" in gate.quantity
    )
    assert gate.passed is passes and gate.detail.startswith(f"{lost} of {prompts};")


@pytest.mark.parametrize(("prompts", "told"), [(5, True), (6, False)])
def test_an_interval_of_too_few_prompts_says_so(prompts: int, told: bool) -> None:
    change = PsnrChange(median=0.5, low=0.4, high=0.6, mean=0.5, lost=0, prompts=prompts)
    gates = deployment_gates("onnx", figures(psnr_change=change), quantized=True)
    (gate,) = (gate for gate in gates if gate.quantity == "change of image PSNR")
    assert gate.passed is False and ("too few for 95 %" in gate.detail) is told


def test_floats_are_held_to_the_limit_in_every_prompt() -> None:
    gates = deployment_gates("onnx", figures(worst_prompt_snr_db=-3.0), quantized=False)
    assert [gate.quantity for gate in gates if not gate.passed] == ["noise SNR, worst prompt"]


def figures(**changes: Any) -> DeploymentFigures:
    """Of a rung without fault, but for `changes`."""
    perfect: dict[str, Any] = {
        "noise_snr_db": 120.0,
        "worst_prompt_snr_db": 120.0,
        "same_codes_snr_db": 120.0,
        "text_encoder_snr_db": 120.0,
        "vae_decoder_snr_db": 120.0,
        "vae_encoder_snr_db": None,
        "unseen": (),
        "flip_fraction": 0.0,
        "flip_max": 0,
        "flip_detail": "",
        "psnr_change": None,
        "first_divergence": "",
    }
    return DeploymentFigures(**perfect | changes)


def test_a_quantized_component_whose_codes_are_not_seen_is_left_open() -> None:
    """One flip of its codes loses more than the limit allows, and is no fault."""
    seen = figures(text_encoder_snr_db=49.0)
    unseen = figures(
        text_encoder_snr_db=None, unseen=("text encoder SNR",), flip_detail="openvino shows no codes"
    )
    (gate,) = (one for one in deployment_gates("onnx", seen, quantized=True) if one.passed is False)
    assert gate.quantity == "text encoder SNR"
    (gate,) = (
        one for one in deployment_gates("onnx", unseen, quantized=True) if one.quantity == "text encoder SNR"
    )
    assert gate.passed is None and gate.detail == "openvino shows no codes"
    assert not judges_denoiser(gate)


@pytest.mark.parametrize("quantity", ["text_encoder", "vae_decoder", "vae_encoder"])
def test_other_components_are_held_to_the_limit(quantity: str) -> None:
    gates = deployment_gates("onnx", figures(**{f"{quantity}_snr_db": 30.0}), quantized=False)
    (failed,) = (gate for gate in gates if gate.passed is False)
    assert failed.quantity.lower().replace(" ", "_") == f"{quantity}_snr"
