"""How the outputs of text encoders become what a denoiser is told, one function for each way.

On the torch backend the tensors equal those that `encode_prompt` of diffusers' pipelines makes, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from quest_deploy.model.conditioning.text import Outputs, TextEncoders, token_limit, tokens_of
from quest_deploy.model.families import JOINT_T5_TOKENS
from quest_deploy.model.libraries import class_of
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
    """PixArt: one encoder, and which of the tokens are padding; prompts in lower case."""
    return _masked(encoders, [prompt.lower().strip() for prompt in prompts])


def _masked(encoders: TextEncoders, prompts: Sequence[str], limit: int | None = None) -> dict[str, Tensor]:
    (part,) = encoders.parts
    tokens = encoders.tokens(part, prompts, limit)
    return {
        "encoder_hidden_states": encoders.run(part.name, tokens)["last_hidden_state"],
        "encoder_attention_mask": tokens["attention_mask"],
    }


def instructed(encoders: TextEncoders, prompts: Sequence[str], denoiser: ComponentSpec) -> dict[str, Tensor]:
    """Sana: as :func:`masked`, with instructions before the prompt, of which the denoiser sees the first token."""
    (part,) = encoders.parts
    instruction = "\n".join(sana_instruction())
    length = token_limit(part, encoders.tokenizers[part.name])
    before = len(tokens_of(encoders.tokenizers[part.name], instruction))
    told = _masked(
        encoders, [instruction + prompt.lower().strip() for prompt in prompts], before + length - 2
    )
    return {name: torch.cat([value[:, :1], value[:, 1 - length :]], dim=1) for name, value in told.items()}


def sana_instruction() -> list[str]:
    """What diffusers puts before every prompt by default, line by line."""
    pipeline = class_of("diffusers", "SanaPipeline")
    parameters = inspect.signature(pipeline.__call__).parameters
    lines: list[str] = parameters["complex_human_instruction"].default
    return lines


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
    "instructed": instructed,
    "joint": joint,
    "pooled": pooled,
}
