"""Quantized attention: both products of an attention take codes, as every other product does.

With timestep group g and, for each operand x of {q, k, p, v}, the table r_x of its quantizer (DESIGN §2)::

    p = softmax(Q(q r_q) Q(k r_k)^T * (1 / r_q) (1 / r_k) / sqrt(d)),    o = Q(p r_p) Q(v r_v) * (1 / r_p) (1 / r_v)

which is exported as it stands: attention is decomposed wherever it holds quantizers. Probabilities lie in [0, 1], so on
a grid with zero-point 0 their codes are 0..127, seven bits; their scale is calibrated, as 1/127 would round the
probabilities of many keys to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quest_deploy.errors import CalibrationError
from quest_deploy.quantize.layers import ActivationQuantizer, TimestepContext, under_autocast

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

QUERY, KEY, PROBABILITIES, VALUE = OPERANDS = ("query", "key", "probabilities", "value")
PROCESSOR = "processor"
SOFTMAX_QMIN, SOFTMAX_QMAX = 0, 127


@dataclass(frozen=True, kw_only=True)
class OperandQParams:
    """What quantizes one operand of an attention's products.

    Attributes:
        group_scale: float32 [G].
        qmin: Smallest code.
        qmax: Largest code.
    """

    group_scale: Tensor
    qmin: int
    qmax: int


class QuantizedAttention(nn.Module):
    """Processor of diffusers' `Attention` that computes both products from quantized operands.

    Args:
        operands: By name (:data:`OPERANDS`) what each operand passes; one that is not there stays in float.
        context: The timestep groups.
    """

    def __init__(self, operands: Mapping[str, nn.Module], context: TimestepContext) -> None:
        super().__init__()
        for name in OPERANDS:
            self.add_module(name, operands.get(name))
        self.context = context

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As `forward`; diffusers looks at these names, and would warn and leave out what is not among them."""
        output: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return output

    def quantized(self, name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """An operand as its product takes it, and what the product is multiplied by for it."""
        operand = self._modules[name]
        if operand is None:
            return x, None
        x, unscale = operand(x, self.context.group)
        if not under_autocast(x) or not isinstance(operand, ActivationQuantizer):
            return x, unscale
        # A value of the grid is no bfloat16 number, but its code is, as in a quantized layer.
        step = operand.tables()[0]
        return x / step, step if unscale is None else unscale * step

    def products(self) -> list[str]:
        """Which of the two products have codes on both sides."""
        pairs = {"scores": (QUERY, KEY), "output": (PROBABILITIES, VALUE)}
        return [name for name, pair in pairs.items() if all(self._modules[side] is not None for side in pair)]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Both products.

        Args:
            query: float32 [b, heads, queries, d].
            key: float32 [b, heads, keys, d].
            value: float32 [b, heads, keys, d].
            scale: What the scores are multiplied by.
            mask: Added to the scores, broadcastable to [b, heads, queries, keys], or None.

        Returns:
            float32 [b, heads, queries, d].
        """
        query, unscale_query = self.quantized(QUERY, query)
        # Transposed before it is quantized, so that a product reads the quantizer's output directly.
        key, unscale_key = self.quantized(KEY, key.transpose(-1, -2))
        factor: Tensor | float = scale
        for unscale in (unscale_query, unscale_key):
            factor = factor if unscale is None else factor * unscale
        scores = _product(query, key) * factor
        if mask is not None:
            scores = scores + mask
        probabilities, unscale_probabilities = self.quantized(PROBABILITIES, scores.softmax(dim=-1))
        value, unscale_value = self.quantized(VALUE, value)
        output = _product(probabilities, value)
        for unscale in (unscale_probabilities, unscale_value):
            output = output if unscale is None else output * unscale
        return output

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What diffusers calls: [b, l, c] or [b, c, h, w] -> the same shape."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        spatial = hidden_states.shape[2:] if hidden_states.ndim == 4 else None
        if spatial is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        source = hidden_states
        if encoder_hidden_states is not None:
            source = encoder_hidden_states
            if attn.norm_cross:
                source = attn.norm_encoder_hidden_states(source)
        batch, keys = source.shape[:2]
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        mask = attn.prepare_attention_mask(attention_mask, keys, batch)
        if mask is not None:
            mask = mask.unflatten(0, (batch, attn.heads))
        output = self.attend(query, key, value, attn.scale, mask).transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](output))
        if spatial is not None:
            output = output.transpose(1, 2).unflatten(-1, spatial)
        if attn.residual_connection:
            output = output + residual
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


def _product(left: Tensor, right: Tensor) -> Tensor:
    """float32 even where autocast rounds the sums, since the scales that follow are."""
    product = left @ right
    return product.to(torch.float32) if under_autocast(product) else product


def attentions(denoiser: nn.Module) -> dict[str, Any]:
    """Every attention whose products can be quantized, by name: those with diffusers' plain processors."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, Attention) and type(module.processor) in (AttnProcessor, AttnProcessor2_0)
    }


def quantized_attentions(denoiser: nn.Module) -> dict[str, QuantizedAttention]:
    """Every processor with quantized operands, by name, in module order."""
    return {
        name: module for name, module in denoiser.named_modules() if isinstance(module, QuantizedAttention)
    }


def operand_quantizers(denoiser: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers of all operands, by name (``<attention>.processor.query``), in module order."""
    return {
        f"{name}.{operand}": module
        for name, attention in quantized_attentions(denoiser).items()
        for operand, module in attention.named_children()
        if isinstance(module, ActivationQuantizer)
    }


def operand_name(attention: str, operand: str) -> str:
    """The name of the quantizer of one operand of an attention."""
    return f"{attention}.{PROCESSOR}.{operand}"


def insert_attention(
    denoiser: nn.Module, qparams: Mapping[str, OperandQParams], context: TimestepContext
) -> None:
    """Give the attentions that `qparams` names, by operand, quantized products.

    `context` must be kept up to date by :func:`quest_deploy.quantize.insert.insert`.

    Raises:
        CalibrationError: a name that stands for no operand of the denoiser.
    """
    known = attentions(denoiser)
    operands: dict[str, dict[str, nn.Module]] = {}
    for name, q in qparams.items():
        path, _, operand = name.rpartition(".")
        attention, _, processor = path.rpartition(".")
        if attention not in known or processor != PROCESSOR or operand not in OPERANDS:
            raise CalibrationError(
                f"{name!r} is no operand of an attention of the denoiser; quantize the model again"
            )
        operands.setdefault(attention, {})[operand] = ActivationQuantizer(q.group_scale, q.qmin, q.qmax)
    for name, found in operands.items():
        known[name].processor = QuantizedAttention(found, context)
