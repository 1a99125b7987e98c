"""Gates: what a measured change counts for."""

from __future__ import annotations

from typing import Any

import pytest

from quest_deploy.parity.gates import DeploymentFigures, PsnrChange, deployment_gates


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
        "flip_fraction": 0.0,
        "flip_max": 0,
        "flip_detail": "",
        "psnr_change": None,
        "first_divergence": "",
    }
    return DeploymentFigures(**perfect | changes)
