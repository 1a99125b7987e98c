"""The kinds of diffusers pipelines that can be quantized and deployed: their parts, and how they are conditioned.

One table, so that nothing else has to know a family by name. A denoiser's inputs are in :mod:`quest_deploy.model.spec`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quest_deploy.errors import ConfigError

TEXT_ENCODER = "text_encoder"
VAE_DECODER = "vae_decoder"


@dataclass(frozen=True, kw_only=True)
class Family:
    """The parts of one kind of pipeline, by their folders in a diffusers directory.

    Attributes:
        pipeline: Its class in diffusers.
        denoiser: Folder of the denoiser, which is also the name of that component.
        denoiser_class: Class of a denoiser whose configuration names none.
        autoencoder: Folder of the autoencoder; None where the denoiser draws pixels.
        has_text: Whether there are a text encoder and a tokenizer.
    """

    pipeline: str
    denoiser: str = "unet"
    denoiser_class: str
    autoencoder: str | None = None
    has_text: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        """Folders that hold weights."""
        text = (TEXT_ENCODER,) if self.has_text else ()
        return (*text, self.denoiser, *(() if self.autoencoder is None else (self.autoencoder,)))

    @property
    def companions(self) -> tuple[str, ...]:
        """Folders besides those that hold weights."""
        return ("tokenizer", "scheduler") if self.has_text else ("scheduler",)


FAMILIES = {
    family.pipeline: family
    for family in (
        Family(
            pipeline="StableDiffusionPipeline",
            denoiser_class="UNet2DConditionModel",
            autoencoder="vae",
            has_text=True,
        ),
        Family(
            pipeline="DiTPipeline",
            denoiser="transformer",
            denoiser_class="DiTTransformer2DModel",
            autoencoder="vae",
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
    if config.get("num_embeds_ada_norm") is not None:
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
    """At least `count` prompts that a model can be measured on, where `given` may be empty.

    Args:
        family: The model's.
        classes: Its classes; None where it has none.
        given: What was asked for.
        default: For a model that reads text, if nothing was asked for.
        count: How many. Classes go round; what an unconditional model draws is only numbered.

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
