"""The kinds of diffusers pipelines that can be quantized and deployed: their parts, and how they are conditioned.

One table, so that nothing else has to know a family by name. A denoiser's inputs are in :mod:`quest_deploy.model.spec`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from quest_deploy.errors import ConfigError

DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"
TEXT_ENCODER = "text_encoder"
VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"

# What T5 reads in Stable Diffusion 3; models without it have zeros in its place.
JOINT_T5_TOKENS = 256
# What Sana's denoiser is told of; its text encoder reads instructions before them.
SANA_TOKENS = 300
# The class of the refiner of Stable Diffusion XL.
REFINER = "StableDiffusionXLImg2ImgPipeline"

TextKind = Literal["clip", "clip-projection", "t5", "gemma"]
"""`CLIPTextModel`, `CLIPTextModelWithProjection`, `T5EncoderModel`, `Gemma2Model`."""


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """One text encoder of a family, with the tokenizer that goes with it.

    Attributes:
        name: Its folder, which is also the name of the component.
        kind: Its class.
        hidden_states: Whether every layer's output is one of the component's, because an inner one is read.
        max_tokens: What prompts are padded to; None is the tokenizer's own length.
        masked: Whether the encoder is told which tokens are padding, and the denoiser as well.
        optional: Whether some models do without it.
    """

    name: str = TEXT_ENCODER
    kind: TextKind = "clip"
    hidden_states: bool = False
    max_tokens: int | None = None
    masked: bool = False
    optional: bool = False

    @property
    def tokenizer(self) -> str:
        """Folder of the tokenizer."""
        return self.name.replace(TEXT_ENCODER, "tokenizer")


@dataclass(frozen=True, kw_only=True)
class Family:
    """The parts of one kind of pipeline, by their folders in a diffusers directory.

    Attributes:
        pipeline: Its class in diffusers.
        denoiser: Folder of the denoiser, which is also the name of that component.
        denoiser_class: Class of a denoiser whose configuration names none.
        autoencoder: Folder of the autoencoder; None where the denoiser draws pixels.
        reads_images: Whether the autoencoder's encoder is a component too, for images to start from.
        controlnet: Folder of a network that adds to the denoiser's skip connections what it sees in a picture.
        text: The text encoders, in the order of their numbers; of a model, those that it has.
        prompting: How their outputs become what the denoiser is told: a function of
            :mod:`quest_deploy.model.conditioning`.
        negative_prompting: The same for negative prompts, where it is another way.
        sequence: The text tokens that the denoiser is told of: those of an encoder, or that many; empty means those of
            the last encoder.
        guided: Whether a model that reads text has a negative branch, where no input takes the guidance scale.
        timestep_divisor: What the denoiser has the scheduler's timesteps divided by.
        even_sigmas: Whether a flow's noise levels are spread evenly from 1 to 1 / steps before they are shifted.
        max_shift: How far the most image tokens shift a flow's noise levels, where the scheduler does not say.
        zero_negative: Whether zeros, instead of the empty prompt's embeddings, stand for no negative prompt.
        aesthetic: Whether the denoiser is told an aesthetic score where others are told the size to draw.
    """

    pipeline: str
    denoiser: str = "unet"
    denoiser_class: str
    autoencoder: str | None = None
    reads_images: bool = False
    controlnet: str | None = None
    text: tuple[TextPart, ...] = ()
    prompting: str = "last"
    negative_prompting: str | None = None
    sequence: tuple[str | int, ...] = ()
    guided: bool = True
    timestep_divisor: int = 1
    even_sigmas: bool = False
    max_shift: float = 1.15
    zero_negative: bool = False
    aesthetic: bool = False

    @property
    def has_text(self) -> bool:
        """Whether prompts are texts."""
        return bool(self.text)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Folders of the text encoders."""
        return tuple(part.name for part in self.text)

    @property
    def weights(self) -> tuple[str, ...]:
        """Folders that hold weights."""
        return (
            *self.text_encoders,
            self.denoiser,
            *(name for name in (self.controlnet, self.autoencoder) if name is not None),
        )

    def library_of(self, folder: str) -> str:
        """Which library loads what lies in a folder with weights."""
        return TRANSFORMERS if folder in self.text_encoders else DIFFUSERS

    @property
    def companions(self) -> tuple[str, ...]:
        """Folders besides those that hold weights."""
        return (*(part.tokenizer for part in self.text), "scheduler")

    def of_index(self, index: Mapping[str, Any]) -> Family:
        """The family as one model has it: without the text encoders that its ``model_index.json`` leaves out.

        That file also has the pipeline's own settings.
        """
        left_out = {name for name, entry in index.items() if entry in (None, [None, None])}
        text = tuple(part for part in self.text if not (part.optional and part.name in left_out))
        return replace(
            self,
            text=text,
            zero_negative=bool(index.get("force_zeros_for_empty_prompt", self.zero_negative)),
            aesthetic=bool(index.get("requires_aesthetics_score", self.aesthetic)),
        )


FAMILIES = {
    family.pipeline: family
    for family in (
        Family(
            pipeline="StableDiffusionPipeline",
            denoiser_class="UNet2DConditionModel",
            autoencoder="vae",
            text=(TextPart(),),
        ),
        Family(
            pipeline="StableDiffusionControlNetPipeline",
            denoiser_class="UNet2DConditionModel",
            autoencoder="vae",
            controlnet="controlnet",
            text=(TextPart(),),
        ),
        Family(
            pipeline="StableDiffusionInpaintPipeline",
            denoiser_class="UNet2DConditionModel",
            autoencoder="vae",
            reads_images=True,
            text=(TextPart(),),
        ),
        Family(
            pipeline="LatentConsistencyModelPipeline",
            denoiser_class="UNet2DConditionModel",
            autoencoder="vae",
            text=(TextPart(),),
        ),
        *(
            Family(
                pipeline=pipeline,
                denoiser_class="UNet2DConditionModel",
                autoencoder="vae",
                reads_images=pipeline == REFINER,
                text=(
                    TextPart(hidden_states=True, optional=True),
                    TextPart(name="text_encoder_2", kind="clip-projection", hidden_states=True),
                ),
                prompting="penultimate",
                zero_negative=True,
            )
            for pipeline in ("StableDiffusionXLPipeline", REFINER)
        ),
        Family(
            pipeline="DiTPipeline",
            denoiser="transformer",
            denoiser_class="DiTTransformer2DModel",
            autoencoder="vae",
        ),
        *(
            Family(
                pipeline=pipeline,
                denoiser="transformer",
                denoiser_class="PixArtTransformer2DModel",
                autoencoder="vae",
                text=(TextPart(kind="t5", max_tokens=tokens, masked=True),),
                prompting="masked",
            )
            for pipeline, tokens in (("PixArtAlphaPipeline", 120), ("PixArtSigmaPipeline", 300))
        ),
        Family(
            pipeline="StableDiffusion3Pipeline",
            denoiser="transformer",
            denoiser_class="SD3Transformer2DModel",
            autoencoder="vae",
            text=(
                TextPart(kind="clip-projection", hidden_states=True),
                TextPart(name="text_encoder_2", kind="clip-projection", hidden_states=True),
                TextPart(name="text_encoder_3", kind="t5", max_tokens=JOINT_T5_TOKENS, optional=True),
            ),
            prompting="joint",
            sequence=(TEXT_ENCODER, JOINT_T5_TOKENS),
            max_shift=1.16,
        ),
        Family(
            pipeline="SanaPipeline",
            denoiser="transformer",
            denoiser_class="SanaTransformer2DModel",
            autoencoder="vae",
            text=(TextPart(kind="gemma", max_tokens=SANA_TOKENS, masked=True),),
            prompting="instructed",
            negative_prompting="masked",
            sequence=(SANA_TOKENS,),
        ),
        Family(
            pipeline="FluxPipeline",
            denoiser="transformer",
            denoiser_class="FluxTransformer2DModel",
            autoencoder="vae",
            text=(TextPart(), TextPart(name="text_encoder_2", kind="t5", max_tokens=512)),
            prompting="pooled",
            guided=False,
            timestep_divisor=1000,
            even_sigmas=True,
        ),
        Family(pipeline="LDMPipeline", denoiser_class="UNet2DModel", autoencoder="vqvae"),
        Family(pipeline="DDPMPipeline", denoiser_class="UNet2DModel"),
        Family(pipeline="DDIMPipeline", denoiser_class="UNet2DModel"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes that a class-conditional denoiser draws.

    Attributes:
        count: Classes have the numbers 0 to `count` - 1.
        null: The number that stands for no class, which guidance needs; None where the model has none.
        names: Number of each name.
    """

    count: int
    null: int | None
    names: Mapping[str, int] = field(default_factory=dict)

    def number(self, prompt: str) -> int:
        """The class of a prompt: a name, or a number; the empty prompt is the null class.

        Raises:
            ConfigError: there is no such class.
        """
        prompt = prompt.strip()
        if prompt in self.names:
            return self.names[prompt]
        if not prompt and self.null is not None:
            return self.null
        if prompt.isdecimal() and int(prompt) < self.count:
            return int(prompt)
        near = difflib.get_close_matches(prompt, self.names, n=3)
        meant = f", did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ConfigError(
            f"{prompt!r} is no class of this model{meant}; give a number from 0 to {self.count - 1}"
            + (", or a name of its model_index.json" if self.names else "")
        )

    def prompts(self) -> tuple[str, ...]:
        """One prompt for each class."""
        first: dict[int, str] = {}
        for name, number in self.names.items():
            first.setdefault(number, name)
        return tuple(first.get(number, str(number)) for number in range(self.count))


def read_classes(index: Mapping[str, Any], config: Mapping[str, Any]) -> Classes | None:
    """The classes of a model; None if it has none.

    A DiT keeps one embedding more than it has classes, the null class. A U-Net of ``num_class_embeds`` embeddings has a
    null class, its last, if ``id2label`` in ``model_index.json`` names all the others: diffusers has no field for it.

    Args:
        index: Content of ``model_index.json``.
        config: The denoiser's configuration.
    """
    labels = {int(number): str(text) for number, text in (index.get("id2label") or {}).items()}
    names = {name.strip(): number for number, text in sorted(labels.items()) for name in text.split(",")}
    if config.get("num_embeds_ada_norm") is not None and config.get("norm_type") == "ada_norm_zero":
        count = int(config["num_embeds_ada_norm"])
        return Classes(count=count, null=count, names=names)
    if config.get("num_class_embeds") is None:
        return None
    count = int(config["num_class_embeds"])
    if sorted(labels) == list(range(count - 1)):
        return Classes(count=count - 1, null=count - 1, names=names)
    return Classes(count=count, null=None, names=names)


def choose_prompts(
    family: Family, classes: Classes | None, given: Sequence[str], *, default: Sequence[str], count: int
) -> tuple[str, ...]:
    """Prompts that a model can be measured on, where `given` may be empty.

    Args:
        family: The model's.
        classes: Its classes; None where it has none.
        given: What was asked for.
        default: For a model that reads text, if nothing was asked for.
        count: How many. Classes go round; what an unconditional model draws is only numbered. Of text, all are
            returned, more or fewer.

    Raises:
        ConfigError: prompts were given to a model that takes none.
    """
    if family.has_text:
        return tuple(given or default)
    if classes is not None:
        chosen = given or classes.prompts()
        return tuple(chosen[index % len(chosen)] for index in range(count))
    if given:
        raise ConfigError("prompts were given, but this model draws without any; leave them out")
    return tuple(f"image {index + 1}" for index in range(count))
