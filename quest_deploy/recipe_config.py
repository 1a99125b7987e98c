"""What a recipe holds; import it from :mod:`quest_deploy.config`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from quest_deploy.checks import at_least, one_of, raise_if_any

ErrorMean = Literal["arithmetic", "geometric"]
Precision = Literal["float32", "tf32", "bfloat16"]
Targets = Literal["memory", "disk", "recompute"]
StaticMode = Literal["int8-weight-only", "w8a8"]
TemporalPath = Literal["quantized", "table"]
Rotated = Literal["feed-forward"]


@dataclass(frozen=True, kw_only=True)
class BitsOverride:
    """Other bits for some layers.

    Attributes:
        layers: Preset of :mod:`quest_deploy.quantize.select`, shell pattern, or name of the layers.
        weight_bits: 4 or 8; None leaves them as they are.
        activation_bits: 4 or 8; None leaves them as they are.
    """

    layers: str
    weight_bits: int | None = None
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        given = {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits}
        problems = [
            f"{name} is {value!r}, expected 4 or 8"
            for name, value in given.items()
            if value not in (None, 4, 8)
        ]
        if set(given.values()) == {None}:
            problems.append("neither weight_bits nor activation_bits is given")
        raise_if_any(problems, f"override of layers {self.layers!r}")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One finetuning phase.

    Attributes:
        layers: Presets of :mod:`quest_deploy.quantize.select` or shell patterns (one, or several): the layers whose
            weights learn. "auto" are those that quantization damages most, which is measured before training: of the
            layers that carry time in the temporal phase, of all others in the sensitive phase.
        steps: Updates.
        auto_share: Of the weights of all quantized layers, how many those that "auto" chooses may have.
        batch_size: Pairs of a prompt and a timestep in an update, each run on both branches.
        walks: Walks in an update, beside them (see `Recipe.walk_share`).
        learning_rate_weights: Adam's rate for weights, in steps of each layer's own weight grid.
        learning_rate_scales: For activation scales, relative (they learn in the log domain), and a quarter of it for
            the scales of weights that learn; in the temporal phase also for time-embedding tables, times the root mean
            square of each table.
        learning_rate_floats: For biases and norms, which stay in float; 0 leaves them alone.
        network_every: Every how many updates the network's output joins the loss of the layers' own outputs
            (temporal phase; the sensitive phase uses the network's output at every update).
        patience: The phase ends after this many validations in a row, of the eight in a phase, that found nothing
            better; 0 means never before its time.
        low_rank: The weights learn as W + B A with B A of this rank, merged when the phase ends (EfficientDM);
            None lets every entry of W learn.
    """

    layers: str | tuple[str, ...]
    steps: int
    auto_share: float = 0.2
    batch_size: int = 8
    walks: int = 2
    learning_rate_weights: float = 0.01
    learning_rate_scales: float = 0.002
    learning_rate_floats: float = 0.0
    network_every: int = 1
    patience: int = 0
    low_rank: int | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        at_least(problems, 0, steps=self.steps, learning_rate_weights=self.learning_rate_weights)
        at_least(problems, 0, learning_rate_scales=self.learning_rate_scales)
        at_least(problems, 0, learning_rate_floats=self.learning_rate_floats)
        at_least(problems, 0, walks=self.walks, patience=self.patience)
        at_least(problems, 1, batch_size=self.batch_size, network_every=self.network_every)
        if not 0 < self.auto_share <= 1:
            problems.append(f"auto_share is {self.auto_share}, expected above 0 and at most 1")
        if self.steps > 0 and not self.layers:
            problems.append(f"layers is {self.layers!r}, expected at least one where there are steps")
        if self.low_rank is not None:
            at_least(problems, 1, low_rank=self.low_rank)
        raise_if_any(problems, "finetuning phase")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `finetune` does to a model.

    Attributes:
        name: For manifests and reports.
        weight_bits: 4 or 8.
        activation_bits: 4 or 8.
        overrides: Other bits for some layers; where two apply, the later one holds.
        calibration_prompts: How many of the prompts are used, those that select the result included.
        validation_prompts: How many of those are kept from training and choose the result; scales and the rounding at
            the start are of all.
        calibration_steps: Denoising steps of the recorded trajectories, hence timestep groups.
        guidance_scale: Of the recorded trajectories.
        initializer: How weights are rounded at first: to nearest, with second-order error compensation, or by gradient
            descent on the outputs of whole blocks.
        adaround_iterations: Updates for each block, of 32 samples; used by `initializer: adaround` alone.
        time_aware: Whether every timestep group has an activation scale of its own.
        collapse_loss_db: After training, quantizers whose scales hardly change with the timestep get one scale, as
            many of them as cost at most this much of the noise SNR on the validation prompts: two passes over memory
            less for each in a deployed network. 0 leaves all groups.
        channel_wise: Whether activations may have a channel row folded into the weights.
        temporal_path: What becomes of the layers that carry time: "quantized" as all others, or a learned "table" of
            what they answer at each recorded timestep, in float32 and linear in between, which replaces them.
        migration_exponent: How much of the difficulty a channel row moves from the activations to the weights, from 0
            to 1; "auto" tries three and none for each layer.
        shared_inputs: Whether layers of one module that read the same tensor (queries, keys and values) share one
            activation quantizer and channel row, so that an engine quantizes that tensor once.
        split: Whether convolutions over a skip concatenation have a grid for each half.
        rotation: "feed-forward" puts a Hadamard matrix (blocks of up to 64 channels) in front of the second layer of
            every feed-forward, whose gated inputs have heavy tails, and turns its weight back: the same function, one
            small product in floats more, and less lost to rounding (nothing happens to a model without feed-forwards);
            None leaves layers as they are.
        attention_bits: 4 or 8, of queries and keys, and of values where the probabilities have codes too (a product
            with codes on one side alone gains nothing); None leaves the products of attention in float.
        softmax_bits: 8, of the attention's probabilities; None leaves those, and values, in float.
        softmax_max_keys: Attentions over more keys than this keep their probabilities and values in float.
        text_encoder: How the text encoder is quantized, "int8-weight-only" or "w8a8"; None leaves it in float.
        vae_decoder: The same for the autoencoder's decoder.
        on_policy_prompts: For how many of the training prompts the quantized network, as it is before phase 2, draws
            trajectories by itself. Half of that phase's pairs are of those, with the full-precision network's answers
            there: what a sampler shows a quantized network is where its own errors led. 0 leaves them out.
        walk_share: Weight of what the student's errors grow into over a few steps of its own, beside its errors on
            recorded latents; 0 leaves walks out.
        walk_length: Steps of such a walk.
        error_mean: Which mean of errors over prompts, steps and walks is made small: the "arithmetic" one, which the
            worst of them decide, or the "geometric" one, which is a signal-to-noise ratio in dB.
        precision: Of the float operations while training: "float32", "tf32" (float32 whose products a GPU may take in
            TensorFloat-32; on a CPU the same as float32) or "bfloat16". Grids and scales are float32 in any case, and
            codes are exact in bfloat16.
        gradient_checkpointing: Whether a pass keeps the inputs of blocks alone, and computes the rest again for the
            gradients: less memory, more time, the same result.
        memory_limit_gb: What finetuning may take, in 10^9 bytes. Where it needs more, fewer prompts are recorded at a
            time, fewer Hessians or samples are in memory while weights are rounded, and updates are computed in slices:
            results are the same but for float rounding. None means no limit.
        targets: Whether the full-precision outputs are kept in memory, read from disk, or computed again.
        temporal: Phase 1.
        sensitive: Phase 2.
    """

    name: str
    weight_bits: int
    activation_bits: int
    overrides: tuple[BitsOverride, ...] = ()
    calibration_prompts: int = 96
    validation_prompts: int = 6
    calibration_steps: int = 25
    guidance_scale: float = 3.0
    initializer: Literal["nearest", "gptq", "adaround"] = "gptq"
    adaround_iterations: int = 1000
    time_aware: bool = True
    collapse_loss_db: float = 0.0
    channel_wise: bool = True
    temporal_path: TemporalPath = "quantized"
    migration_exponent: float | Literal["auto"] = "auto"
    shared_inputs: bool = False
    split: bool = False
    rotation: Rotated | None = None
    attention_bits: int | None = None
    softmax_bits: int | None = None
    softmax_max_keys: int = 256
    text_encoder: StaticMode | None = None
    vae_decoder: StaticMode | None = None
    on_policy_prompts: int = 0
    walk_share: float = 1.0
    walk_length: int = 4
    error_mean: ErrorMean = "arithmetic"
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    memory_limit_gb: float | None = None
    targets: Targets = "memory"
    temporal: PhaseConfig
    sensitive: PhaseConfig

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name in ("weight_bits", "activation_bits"):
            if getattr(self, name) not in (4, 8):
                problems.append(f"{name} is {getattr(self, name)!r}, expected 4 or 8")
        exponent = self.migration_exponent
        if exponent != "auto" and not (isinstance(exponent, int | float) and 0 <= exponent <= 1):
            problems.append(f"migration_exponent is {exponent!r}, expected auto, or a number from 0 to 1")
        if self.attention_bits not in (None, 4, 8):
            problems.append(f"attention_bits is {self.attention_bits!r}, expected 4, 8 or nothing")
        if self.softmax_bits not in (None, 8):
            problems.append(f"softmax_bits is {self.softmax_bits!r}, expected 8 or nothing")
        elif self.softmax_bits is not None and self.attention_bits is None:
            problems.append("softmax_bits is set, expected attention_bits beside it")
        for name in ("text_encoder", "vae_decoder"):
            if getattr(self, name) is not None:
                one_of(problems, name, getattr(self, name), get_args(StaticMode))
        if self.rotation is not None:
            one_of(problems, "rotation", self.rotation, get_args(Rotated))
        one_of(problems, "error_mean", self.error_mean, get_args(ErrorMean))
        one_of(problems, "initializer", self.initializer, ("nearest", "gptq", "adaround"))
        calibration = {name: getattr(self, name) for name in ("calibration_prompts", "calibration_steps")}
        at_least(problems, 2, **calibration)
        at_least(problems, 1, validation_prompts=self.validation_prompts, walk_length=self.walk_length)
        counts = {"softmax_max_keys": self.softmax_max_keys, "adaround_iterations": self.adaround_iterations}
        at_least(problems, 1, **counts)
        at_least(
            problems,
            0,
            guidance_scale=self.guidance_scale,
            on_policy_prompts=self.on_policy_prompts,
            walk_share=self.walk_share,
            collapse_loss_db=self.collapse_loss_db,
        )
        one_of(problems, "temporal_path", self.temporal_path, get_args(TemporalPath))
        one_of(problems, "precision", self.precision, get_args(Precision))
        one_of(problems, "targets", self.targets, get_args(Targets))
        if self.memory_limit_gb is not None and not 0 < self.memory_limit_gb < math.inf:
            problems.append(f"memory_limit_gb is {self.memory_limit_gb}, expected more than 0, and finite")
        if self.validation_prompts >= self.calibration_prompts:
            problems.append(
                f"validation_prompts is {self.validation_prompts}, "
                f"expected fewer than calibration_prompts, {self.calibration_prompts}"
            )
        elif self.on_policy_prompts > self.calibration_prompts - self.validation_prompts:
            problems.append(
                f"on_policy_prompts is {self.on_policy_prompts}, expected at most calibration_prompts without "
                f"validation_prompts, {self.calibration_prompts - self.validation_prompts}"
            )
        if self.on_policy_prompts > 0 and self.sensitive.batch_size < 2:
            problems.append(
                "sensitive.batch_size is 1, expected 2 or more: half of its pairs are on_policy_prompts'"
            )
        raise_if_any(problems, f"recipe {self.name}")
