"""Gates: measured figures against their limits.

Deployment (same weights, another runtime) has fixed limits, DESIGN §7; quantization has a budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from quest_deploy.metrics import share_low
from quest_deploy.parity.budgets import Budget

# By the type of the float operators; in float32 those of DESIGN par. 7. One rounding to fp16 (bf16) leaves 72 (54) dB,
# and a denoiser rounds about a thousand times in a row: 30 dB less.
DEPLOYMENT_SNR_DB_MIN = {"fp32": 50.0, "fp16": 42.0, "bf16": 24.0}
# Rounding moves the largest code, 127, by up to this share of a step; that many codes at most change.
CODE_FLIP_FRACTION_MAX = {"fp32": 1e-4, "fp16": 127 * 2**-11, "bf16": 127 * 2**-8}
CODE_DIFFERENCE_MAX = 1
IMAGE_PSNR_CHANGE_DB_MAX = 0.3
# Of fewer, even least and greatest miss the median more often than one time in twenty: 2 / 2^n.
MEDIAN_PROMPTS = 6
# A flipped code sends a few prompts in a hundred to pictures that are this much farther from full precision's.
LOST_DB = 6.0
LOST_SHARE_MAX = 0.1
NOISE, TEXT_ENCODER_SNR = "noise SNR", "text encoder SNR"
VAE_DECODER_SNR, VAE_ENCODER_SNR = "VAE decoder SNR", "VAE encoder SNR"

GateKind = Literal["quantization", "deployment", "finite"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One requirement and how it came out.

    Attributes:
        rung: Name of the rung that has to meet it.
        kind: Whose cost it limits.
        quantity: What was measured, in words.
        measured: The figure; +inf for an exact match, NaN where it could not be formed, None where it was not measured.
        limit: The bound.
        at_least: Whether `limit` is a floor (else a ceiling).
        unit: Of both figures; empty for a pure number.
        detail: Where it first failed, or why it was not measured.
    """

    rung: str
    kind: GateKind
    quantity: str
    measured: float | None
    limit: float
    at_least: bool
    unit: str = ""
    detail: str = ""

    @property
    def passed(self) -> bool | None:
        """None where nothing was measured. A NaN fails."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def describe(self) -> str:
        """One line for logs and terminals."""
        sign = ">=" if self.at_least else "<="
        got = "not measured" if self.measured is None else f"{self.measured:.4g} {self.unit}".strip()
        got = "identical" if self.measured == math.inf else got
        verdict = {True: "ok", False: "FAILED", None: "open"}[self.passed]
        detail = f" ({self.detail})" if self.detail else ""
        limit = f"{sign} {self.limit:g} {self.unit}".rstrip()
        return f"{self.rung}: {self.quantity} {got}, limit {limit}: {verdict}{detail}"


@dataclass(frozen=True, kw_only=True)
class QuantizationFigures:
    """Against the full-precision reference: means over prompts (and steps, for the noise)."""

    noise_snr_db: float
    image_psnr_db: float
    image_ssim: float
    first_divergence: str


@dataclass(frozen=True, kw_only=True)
class PsnrChange:
    """Changes of image PSNR, paired by prompt, in dB.

    Flipped codes send a few prompts' trajectories elsewhere, to better or worse pictures by many dB. They decide the
    mean of 64 prompts and say nothing about the other 60, so the median is what is held to a limit.

    Attributes:
        median: Over prompts.
        low: Lower end of the median's 95 % interval.
        high: Its upper end.
        mean: Over prompts.
        lost: How many prompts lose more than `LOST_DB`.
        prompts: How many there are.
    """

    median: float
    low: float
    high: float
    mean: float
    lost: int
    prompts: int

    @property
    def certain(self) -> float | None:
        """The least change, in either direction, that the interval leaves room for; None where it has no ends.

        With few prompts the median is a matter of luck: half a dB of spread moves it by a tenth even with 64.
        """
        if math.isinf(self.low) or math.isinf(self.high):
            return None
        if math.isnan(self.low) or math.isnan(self.high):
            return math.nan
        return max(0.0, self.low, -self.high)

    @property
    def certainly_lost(self) -> float | None:
        """The share of prompts that lose, as far as it is certain; None where one prompt says nothing of a share."""
        if math.isnan(self.median):
            return math.nan
        return share_low(self.lost, self.prompts) if self.prompts > 1 else None


@dataclass(frozen=True, kw_only=True)
class DeploymentFigures:
    """Against the upper rung, on its own inputs.

    Attributes:
        noise_snr_db: The worst step's median over prompts, left alone.
        worst_prompt_snr_db: The worst prompt's mean over steps, left alone.
        same_codes_snr_db: The same where every product is given the upper rung's codes; None where that cannot be done.
        text_encoder_snr_db: Of the worst prompt, with the same codes if it is quantized; None for a model that reads no
            text.
        vae_decoder_snr_db: The same, the same latents decoded; None for a model that draws pixels.
        vae_encoder_snr_db: Of the worst prompt, the same images encoded; None for a model that reads none.
        unseen: Quantities of those that have no figure because codes were not compared.
        flip_fraction: Share of the integer codes that differ; None where codes were not compared.
        flip_max: Largest difference of a code.
        flip_detail: The layer with the most flips, or why codes were not compared.
        psnr_change: Of the image PSNR against the reference; None without a quantized anchor.
        first_divergence: First step below the limit, or empty.
    """

    noise_snr_db: float
    worst_prompt_snr_db: float
    same_codes_snr_db: float | None
    text_encoder_snr_db: float | None
    vae_decoder_snr_db: float | None
    vae_encoder_snr_db: float | None
    unseen: tuple[str, ...]
    flip_fraction: float | None
    flip_max: int | None
    flip_detail: str
    psnr_change: PsnrChange | None
    first_divergence: str


def finite_gate(rung: str, problem: str | None) -> Gate:
    """Every tensor of a rung must be finite; `problem` names the first that is not."""
    return Gate(
        rung=rung,
        kind="finite",
        quantity="tensors with NaN or Inf",
        measured=0.0 if problem is None else 1.0,
        limit=0.0,
        at_least=False,
        detail=problem or "",
    )


def quantization_gates(rung: str, figures: QuantizationFigures, budget: Budget) -> list[Gate]:
    """One gate for each floor that the budget sets."""
    rows = (
        ("noise SNR", figures.noise_snr_db, budget.noise_snr_db_min, "dB", figures.first_divergence),
        ("image PSNR", figures.image_psnr_db, budget.image_psnr_db_min, "dB", ""),
        ("image SSIM", figures.image_ssim, budget.image_ssim_min, "", ""),
    )
    return [
        Gate(
            rung=rung,
            kind="quantization",
            quantity=quantity,
            measured=measured,
            limit=limit,
            at_least=True,
            unit=unit,
            # A first step below the mean's floor is worth naming only when the mean itself is below.
            detail=detail if not measured >= limit else "",
        )
        for quantity, measured, limit, unit, detail in rows
        if limit is not None
    ]


def deployment_gates(
    rung: str, figures: DeploymentFigures, *, quantized: bool, dtype: str = "fp32"
) -> list[Gate]:
    """The limits of deployment, for a rung whose float operators have the type `dtype`.

    Left alone, a quantized denoiser turns any flip of a code into an error of the size of its quantization noise, so
    there the noise prediction is held to its limit with the codes given; full precision is held to it as it is.
    """
    noise: list[tuple[str, float | None, str]] = [
        (f"{NOISE}, worst step", figures.noise_snr_db, figures.first_divergence),
        (f"{NOISE}, worst prompt", figures.worst_prompt_snr_db, ""),
    ]
    if quantized:
        detail = figures.flip_detail if figures.same_codes_snr_db is None else ""
        noise = [(f"{NOISE}, same codes", figures.same_codes_snr_db, detail)]
    companions = [
        (quantity, measured, figures.flip_detail if measured is None else "")
        for quantity, measured in (
            (TEXT_ENCODER_SNR, figures.text_encoder_snr_db),
            (VAE_DECODER_SNR, figures.vae_decoder_snr_db),
            (VAE_ENCODER_SNR, figures.vae_encoder_snr_db),
        )
        if measured is not None or quantity in figures.unseen
    ]
    gates = [
        Gate(
            rung=rung,
            kind="deployment",
            quantity=quantity,
            measured=measured,
            limit=DEPLOYMENT_SNR_DB_MIN[dtype],
            at_least=True,
            unit="dB",
            detail=detail,
        )
        for quantity, measured, detail in (*noise, *companions)
    ]
    if not quantized:
        return gates
    ceilings = [
        (
            "int8 codes that differ",
            figures.flip_fraction,
            CODE_FLIP_FRACTION_MAX[dtype],
            "",
            figures.flip_detail,
        ),
        ("largest code difference", figures.flip_max, CODE_DIFFERENCE_MAX, "", ""),
    ]
    if figures.psnr_change is not None:
        ceilings.append(
            (
                "change of image PSNR",
                figures.psnr_change.certain,
                IMAGE_PSNR_CHANGE_DB_MAX,
                "dB",
                _describe_change(figures.psnr_change),
            )
        )
        ceilings.append(
            (
                f"share of images that lose {LOST_DB:g} dB",
                figures.psnr_change.certainly_lost,
                LOST_SHARE_MAX,
                "",
                f"{figures.psnr_change.lost} of {figures.psnr_change.prompts}; counted as far as certain",
            )
        )
    return gates + [
        Gate(
            rung=rung,
            kind="deployment",
            quantity=quantity,
            measured=None if measured is None else float(measured),
            limit=limit,
            at_least=False,
            unit=unit,
            detail=detail,
        )
        for quantity, measured, limit, unit, detail in ceilings
    ]


def judges_denoiser(gate: Gate) -> bool:
    """Whether a gate of deployment holds the denoiser, or what is drawn with it, to a limit."""
    companions = (TEXT_ENCODER_SNR, VAE_DECODER_SNR, VAE_ENCODER_SNR)
    return gate.kind == "deployment" and gate.passed is not None and gate.quantity not in companions


def _describe_change(change: PsnrChange) -> str:
    mean = f"mean {change.mean:+.2f} dB"
    if not all(map(math.isfinite, (change.low, change.high))):
        return f"median {change.median:+.2f} dB; {mean}"
    interval = (
        f"median {change.median:+.2f} dB, 95 % interval {change.low:+.2f} to {change.high:+.2f}; {mean}"
    )
    if change.prompts < MEDIAN_PROMPTS:
        return (
            f"{interval}; {change.prompts} prompts are too few for 95 %, and a good runtime may fail: "
            "raise --num-prompts"
        )
    return interval
