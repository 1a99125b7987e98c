"""What was measured on each rung, and the figures that its gates look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quest_deploy.metrics import IDENTICAL_DB, mean_db, paired_interval
from quest_deploy.model.families import TEXT_ENCODER, VAE_DECODER
from quest_deploy.parity.codes import FlipReport
from quest_deploy.parity.gates import (
    DEPLOYMENT_SNR_DB_MIN,
    LOST_DB,
    TEXT_ENCODER_SNR,
    VAE_DECODER_SNR,
    DeploymentFigures,
    PsnrChange,
    QuantizationFigures,
)
from quest_deploy.parity.ladder import Rung
from quest_deploy.parity.measure import Forced, Trace


@dataclass(frozen=True, kw_only=True)
class Against:
    """One rung against the one above it, on that one's own inputs.

    Attributes:
        forced: Noise prediction on the upper rung's trajectory.
        text_encoder_snr_db: [n]; None for a model that reads no text.
        vae_decoder_snr_db: The upper rung's final latents decoded, [n]; None for a model that draws pixels.
        vae_encoder_snr_db: The upper rung's images encoded, [n]; None for a model that reads none.
        codes: Integer codes in front of each layer; None where they were not compared.
        codes_reason: Why they were not compared.
    """

    forced: Forced
    text_encoder_snr_db: Tensor | None
    vae_decoder_snr_db: Tensor | None
    vae_encoder_snr_db: Tensor | None
    codes: FlipReport | None
    codes_reason: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything measured on one rung.

    Attributes:
        rung: The artifact.
        reason: Why it was not run; empty if it was.
        backend: What ran it.
        seconds: Drawing all images freely, decoding included.
        trace: Its own free run.
        forced: Noise prediction on the reference's trajectory; None for the reference.
        image_psnr_db: Of its images against the reference's, [n].
        image_ssim: The same, [n].
        against: Against the rung above; None for the reference and where that one was not run.
    """

    rung: Rung
    reason: str = ""
    backend: str = ""
    seconds: float = 0.0
    trace: Trace | None = None
    forced: Forced | None = None
    image_psnr_db: Tensor | None = None
    image_ssim: Tensor | None = None
    against: Against | None = None

    @property
    def problem(self) -> str | None:
        """The first tensor that is not finite, in any of this rung's runs."""
        forced = self.against.forced if self.against is not None else None
        found = (part.problem for part in (self.trace, self.forced, forced) if part is not None)
        return next((problem for problem in found if problem is not None), None)


def step_medians(snr_db: Tensor) -> Tensor:
    """Median over prompts at each step: [steps, n] -> [steps]. A NaN makes its step NaN."""
    # The lower of two middle values would be torch.median's; the mean of +inf and a number has no use either, so
    # interpolation counts an exact match as its ceiling and restores it where all prompts match.
    capped = snr_db.clamp(max=IDENTICAL_DB)
    medians = capped.quantile(0.5, dim=1)
    return torch.where(torch.isposinf(snr_db).all(1), torch.full_like(medians, torch.inf), medians)


def first_step_below(snr_db: Tensor, timesteps: tuple[Tensor, ...], limit: float) -> tuple[int, str] | None:
    """Index and description of the first step whose median over prompts is below `limit` (a NaN is below)."""
    for index, median in enumerate(step_medians(snr_db).tolist()):
        if not median >= limit:
            timestep = timesteps[index].item()
            return (
                index,
                f"first at step {index + 1} of {len(timesteps)} (timestep {timestep:g}): {median:.1f} dB",
            )
    return None


def quantization_figures(
    outcome: Outcome, reference: Trace, noise_floor_db: float | None
) -> QuantizationFigures:
    """Means over prompts and steps of a rung that was compared with the reference."""
    assert outcome.forced is not None and outcome.image_psnr_db is not None and outcome.image_ssim is not None
    snr = outcome.forced.snr_db
    below = None if noise_floor_db is None else first_step_below(snr, reference.timesteps, noise_floor_db)
    return QuantizationFigures(
        noise_snr_db=mean_db(snr),
        image_psnr_db=mean_db(outcome.image_psnr_db),
        image_ssim=float(outcome.image_ssim.mean()),
        first_divergence="" if below is None else below[1],
    )


def psnr_change(outcome: Outcome, anchor: Outcome) -> PsnrChange | None:
    """What deployment changed in the image PSNR, paired by prompt.

    None where the anchor is the reference itself (nothing to be compared with) or a figure is not finite.
    """
    above, below = anchor.image_psnr_db, outcome.image_psnr_db
    if above is None or below is None:
        return None
    differences = below.clamp(max=IDENTICAL_DB) - above.clamp(max=IDENTICAL_DB)
    if not bool(torch.isfinite(differences).all()):
        return None
    low, median, high = paired_interval(differences, statistic="median")
    return PsnrChange(
        median=median,
        low=low,
        high=high,
        mean=float(differences.to(torch.float64).mean()),
        lost=int((differences < -LOST_DB).sum()),
        prompts=differences.numel(),
    )


def deployment_figures(outcome: Outcome, upper: Outcome, anchor: Outcome) -> DeploymentFigures:
    """What another runtime changed, on the upper rung's own inputs."""
    against = outcome.against
    assert against is not None and upper.trace is not None
    snr = against.forced.snr_db
    below = first_step_below(snr, upper.trace.timesteps, DEPLOYMENT_SNR_DB_MIN[outcome.rung.dtype])
    total = None if against.codes is None else against.codes.total
    text = _companion(against, outcome.rung, TEXT_ENCODER, against.text_encoder_snr_db)
    decoder = _companion(against, outcome.rung, VAE_DECODER, against.vae_decoder_snr_db)
    change = psnr_change(outcome, anchor)
    if change is None and anchor.image_psnr_db is not None:
        count = anchor.image_psnr_db.numel()
        change = PsnrChange(
            low=torch.nan, mean=torch.nan, high=torch.nan, median=torch.nan, lost=0, prompts=count
        )
    return DeploymentFigures(
        noise_snr_db=_lowest(step_medians(snr)),
        worst_prompt_snr_db=_lowest(torch.tensor([mean_db(prompt) for prompt in snr.T])),
        same_codes_snr_db=None
        if against.codes is None
        else _lowest(step_medians(against.codes.noise_snr_db)),
        text_encoder_snr_db=_worst(text),
        vae_decoder_snr_db=_worst(decoder),
        vae_encoder_snr_db=_worst(against.vae_encoder_snr_db),
        unseen=tuple(
            quantity
            for quantity, figure, alone in (
                (TEXT_ENCODER_SNR, text, against.text_encoder_snr_db),
                (VAE_DECODER_SNR, decoder, against.vae_decoder_snr_db),
            )
            if figure is None and alone is not None
        ),
        flip_fraction=None if total is None else total.fraction,
        flip_max=None if total is None else total.max_difference,
        flip_detail=_flip_detail(against),
        psnr_change=change,
        first_divergence="" if below is None else below[1],
    )


def _companion(against: Against, rung: Rung, start: str, alone: Tensor | None) -> Tensor | None:
    """SNR of the components whose names begin with `start`: as they are, or quantized ones with the same codes.

    One flip loses more than 50 dB: None where they are quantized, and their codes were not compared.
    """
    codes = {} if against.codes is None else against.codes.companions_snr_db
    same = [snr for name, snr in codes.items() if name.startswith(start)]
    if same:
        return torch.stack(same).amin(dim=0)
    quantized = any(name.startswith(start) for name in rung.companions)
    return None if quantized else alone


def _worst(values: Tensor | None) -> float | None:
    return None if values is None else _lowest(values)


def _lowest(values: Tensor) -> float:
    # Tensor.min() hands on a NaN, which min() of floats may lose.
    return float(values.min())


def _flip_detail(against: Against) -> str:
    if against.codes is None:
        return against.codes_reason
    total, worst = against.codes.total, against.codes.worst
    counts = f"{total.differing:,} of {total.places:,} codes in {len(against.codes.layers)} layers"
    if against.codes.unmatched:
        counts += f", {len(against.codes.unmatched)} quantizers without counterpart"
    return f"{counts}; most in {worst.layer}" if worst.flips.differing else counts
