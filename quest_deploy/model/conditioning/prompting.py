"""How the outputs of text encoders become what a denoiser is told, one function for each way.

On the torch backend the tensors equal those that `encode_prompt` of diffusers' pipelines makes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from quest_deploy.model.conditioning.text import Outputs, TextEncoders
from quest_deploy.model.families import JOINT_T5_TOKENS
from quest_deploy.model.tensors import ComponentSpec

Prompting = Callable[[TextEncoders, Sequence[str], ComponentSpec], dict[str, Tensor]]
"""(encoders, n prompts, the denoiser's inputs) -> what the denoiser is told, [n, ...] by input name."""


def last(encoders: TextEncoders, prompts: Sequence[str], denoiser: ComponentSpec) -> dict[str, Tensor]:
    """Stable Diffusion 1.x and 2.x: the last layer of one CLIP text model, its final norm included."""
    (part,) = encoders.parts
    return {"encoder_hidden_states": encoders(part, prompts)["last_hidden_state"]}


def penultimate(encoders: TextEncoders, prompts: Sequence[str], denoiser: ComponentSpec) -> dict[str, Tensor]:
    """Stable Diffusion XL: the last layer but one of every encoder, side by side; pooled, what the last projects."""
    outputs = [encoders(part, prompts) for part in encoders.parts]
    return {
        "encoder_hidden_states": torch.cat([before_last(output) for output in outputs], dim=-1),
        "text_embeds": outputs[-1]["text_embeds"],
    }


def before_last(outputs: Outputs) -> Tensor:
    """The output of the last layer but one, [n, tokens, d], of an encoder that gives those of every layer."""
    layers = [int(name.partition(".")[2]) for name in outputs if name.startswith("hidden_states.")]
    return outputs[f"hidden_states.{max(layers) - 1}"]


def masked(encoders: TextEncoders, prompts: Sequence[str], denoiser: ComponentSpec) -> dict[str, Tensor]:
    """PixArt: a T5 encoder, and which of the tokens are padding; prompts in lower case."""
    (part,) = encoders.parts
    tokens = encoders.tokens(part, [prompt.lower().strip() for prompt in prompts])
    return {
        "encoder_hidden_states": encoders.run(part.name, tokens)["last_hidden_state"],
        "encoder_attention_mask": tokens["attention_mask"],
    }


def joint(encoders: TextEncoders, prompts: Sequence[str], denoiser: ComponentSpec) -> dict[str, Tensor]:
    """Stable Diffusion 3: two CLIP encoders side by side, widened with zeros, then the tokens of T5 or zeros for them.

    Pooled, what both CLIP encoders project, side by side.
    """
    outputs = [encoders(part, prompts) for part in encoders.parts if part.kind == "clip-projection"]
    text = torch.cat([before_last(output) for output in outputs], dim=-1)
    width = int(_shape_of(denoiser, "encoder_hidden_states")[-1])
    read = [encoders(part, prompts)["last_hidden_state"] for part in encoders.parts if part.kind == "t5"]
    more = read or [text.new_zeros(len(prompts), JOINT_T5_TOKENS, width)]
    return {
        "encoder_hidden_states": torch.cat([pad(text, (0, width - text.shape[-1])), *more], dim=-2),
        "pooled_projections": torch.cat([output["text_embeds"] for output in outputs], dim=-1),
    }


def pooled(encoders: TextEncoders, prompts: Sequence[str], denoiser: ComponentSpec) -> dict[str, Tensor]:
    """FLUX: the tokens of T5, and the pooled output of a CLIP text model."""
    clip, t5 = encoders.parts
    return {
        "encoder_hidden_states": encoders(t5, prompts)["last_hidden_state"],
        "pooled_projections": encoders(clip, prompts)["pooler_output"],
    }


def _shape_of(denoiser: ComponentSpec, name: str) -> tuple[int | str, ...]:
    return next(tensor.shape for tensor in denoiser.inputs if tensor.name == name)


PROMPTINGS: dict[str, Prompting] = {
    "last": last,
    "penultimate": penultimate,
    "masked": masked,
    "joint": joint,
    "pooled": pooled,
}
