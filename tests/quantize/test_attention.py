"""Quantized attention: what diffusers computes where nothing is quantized, codes and time-aware scales where it is."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.artifacts import write_artifact
from quest_deploy.config import PhaseConfig
from quest_deploy.errors import CalibrationError, ConfigError
from quest_deploy.model.components import predict
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import train
from quest_deploy.quantize.attention import (
    OPERANDS,
    OperandQParams,
    QuantizedAttention,
    attentions,
    insert_attention,
    operand_quantizers,
    quantized_attentions,
)
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.checkpoint import freeze, load_checkpoint, save_checkpoint
from quest_deploy.quantize.insert import insert, quantized_layers
from quest_deploy.quantize.layers import ActivationQuantizer, TimestepContext
from quest_deploy.quantize.operands import (
    AttentionBits,
    collect_operands,
    find_operands,
    initialize_operands,
)
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.resume import WorkDirectory
from quest_deploy.quantize.trace import Trace

BITS = AttentionBits(operands=8, probabilities=True, max_keys=256)
CODES = (-128, 127)
SELF = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def samples(float_model: LoadedModel, recorded: CalibrationSet) -> dict[str, Tensor]:
    """What the operands of the tiny U-Net's attentions are."""
    return collect_operands(float_model.denoiser, recorded, prompts_per_step=2, values=512, seed=0)


def quantized_attention_only(
    model: LoadedModel, data: CalibrationSet, samples: dict[str, Tensor], bits: AttentionBits = BITS
) -> tuple[nn.Module, TimestepContext]:
    """The tiny U-Net with float layers and quantized attention."""
    denoiser, context = copy.deepcopy(model.denoiser), TimestepContext(data.boundaries())
    insert(denoiser, {}, context)
    insert_attention(denoiser, initialize_operands(samples, bits, time_aware=True), context)
    return denoiser.requires_grad_(False), context


def answer(denoiser: nn.Module, data: CalibrationSet) -> Tensor:
    sample, timestep, conditioning, _ = data.batch(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    with torch.no_grad():
        return predict(denoiser, sample, timestep, conditioning)


def snr_db(reference: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - got).square().sum()))


@pytest.mark.parametrize(
    ("options", "shape", "source", "masked"),
    [
        ({}, (2, 6, 8), None, False),
        ({"cross_attention_dim": 5}, (2, 6, 8), (2, 3, 5), True),
        ({"norm_num_groups": 2, "residual_connection": True, "rescale_output_factor": 1.5, "bias": True}, (2, 8, 3, 4),
         None, False),
        ({"qk_norm": "layer_norm"}, (2, 6, 8), None, True),
    ],
    ids=["self", "cross-masked", "spatial", "qk-norm-masked"],
)  # fmt: skip
def test_without_quantizers_it_computes_what_diffusers_computes(
    options: dict, shape: tuple[int, ...], source: tuple[int, ...] | None, masked: bool
) -> None:
    from diffusers.models.attention_processor import Attention

    attention = Attention(query_dim=8, heads=2, dim_head=4, **options).eval()
    x = torch.randn(shape)
    context = None if source is None else torch.randn(source)
    keys = 6 if source is None else source[1]
    mask = torch.where(torch.rand(2, 1, keys) < 0.4, -1e4, 0.0) if masked else None
    with torch.no_grad():
        expected = attention(x, context, attention_mask=mask)
        attention.processor = QuantizedAttention({}, TimestepContext(torch.empty(0)))
        got = attention(x, context, attention_mask=mask)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_it_is_told_the_time_and_diffusers_warns_of_nothing() -> None:
    from diffusers.models import attention_processor
    from diffusers.models.attention_processor import Attention

    attention = Attention(query_dim=32, heads=2, dim_head=16, spatial_norm_dim=3).eval()
    x, temb = torch.randn(2, 32, 4, 4), torch.randn(2, 3, 4, 4)
    with torch.no_grad(), mock.patch.object(attention_processor.logger, "warning") as warned:
        expected = attention(x, temb=temb)
        attention.processor = QuantizedAttention({}, TimestepContext(torch.empty(0)))
        got = attention(x, temb=temb)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not warned.called


def test_eight_bits_hardly_change_the_prediction(
    float_model: LoadedModel, recorded: CalibrationSet, samples: dict[str, Tensor]
) -> None:
    denoiser, _ = quantized_attention_only(float_model, recorded, samples)
    true = answer(float_model.denoiser, recorded)
    four, _ = quantized_attention_only(
        float_model, recorded, samples, AttentionBits(operands=4, probabilities=True, max_keys=256)
    )
    assert 120 > snr_db(true, answer(denoiser, recorded)) > snr_db(true, answer(four, recorded)) + 6


def test_probabilities_have_codes_from_0_to_127(
    float_model: LoadedModel, recorded: CalibrationSet, samples: dict[str, Tensor]
) -> None:
    denoiser, _ = quantized_attention_only(float_model, recorded, samples)
    seen = []
    quantizer = operand_quantizers(denoiser)[f"{SELF}.processor.probabilities"]
    quantizer.register_forward_hook(lambda module, args, out: seen.append(out[0] / module.tables()[0]))
    answer(denoiser, recorded)
    codes = seen[0].round()
    assert codes.min() >= 0 and 16 < codes.max() <= 127


def test_probabilities_over_many_keys_keep_their_mass(samples: dict[str, Tensor]) -> None:
    name = f"{SELF}.processor.probabilities"
    spread = torch.randn(3, 2048).mul(0.5).softmax(dim=-1)
    given = {
        name: torch.cat([spread, spread.amin(1, True), spread.amax(1, True)], 1),
        f"{name}.keys": torch.tensor([9]),
    }
    scale = initialize_operands(given, BITS, time_aware=True)[name].group_scale
    kept = (spread / scale[:, None]).round().clamp(0, 127) * scale[:, None]
    torch.testing.assert_close(kept.sum(dim=1), torch.ones(3), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("bits", "quantized"),
    [
        (AttentionBits(operands=8, probabilities=True, max_keys=256), True),
        (AttentionBits(operands=8, probabilities=False, max_keys=256), False),
        (AttentionBits(operands=8, probabilities=True, max_keys=4), False),
    ],
    ids=["wanted", "not wanted", "too many keys"],
)
def test_probabilities_are_quantized_where_they_should_be(
    samples: dict[str, Tensor], bits: AttentionBits, quantized: bool
) -> None:
    found = initialize_operands(samples, bits, time_aware=True)
    assert (f"{SELF}.processor.probabilities" in found) is quantized
    # A product with codes on one side alone would gain nothing.
    assert (f"{SELF}.processor.value" in found) is quantized
    assert f"{SELF}.processor.query" in found


def test_every_timestep_group_has_scales_of_its_own() -> None:
    context = TimestepContext(torch.tensor([500.0]))
    operands = {name: ActivationQuantizer(torch.tensor([0.02, 0.1]), -128, 127) for name in OPERANDS}
    attention, q = QuantizedAttention(operands, context), torch.randn(2, 2, 5, 4)
    outputs = []
    for timesteps in ([10.0], [900.0], [10.0, 900.0]):
        context.set_timestep(torch.tensor(timesteps))
        outputs.append(attention.attend(q, q, q, 0.5, None))
    torch.testing.assert_close(outputs[2], torch.stack([outputs[0][0], outputs[1][1]]))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


@pytest.fixture
def eight_bits() -> QuantizedAttention:
    """Codes on both sides of both products, three timestep groups; all scales learn."""
    context = TimestepContext(torch.tensor([300.0, 700.0]))
    scales = dict.fromkeys(OPERANDS, 0.02) | {"probabilities": 0.006}
    operands = {
        name: ActivationQuantizer(
            scale * torch.tensor([1.0, 1.4, 0.8]), *(CODES if scale > 0.01 else (0, 127))
        )
        for name, scale in scales.items()
    }
    context.set_timestep(torch.tensor([10.0, 900.0]))
    return QuantizedAttention(operands, context)


def test_products_take_codes_in_bfloat16(eight_bits: QuantizedAttention) -> None:
    x = torch.randn(2, 2, 5, 4)
    exact, unscale = eight_bits.quantized("query", x)
    with train.autocast(torch.device("cpu"), "bfloat16"):
        codes, factor = eight_bits.quantized("query", x)
    rounded = codes.detach().to(torch.bfloat16).float()
    assert torch.equal(rounded, rounded.round()) and rounded.abs().max() > 64
    expected = exact.detach() if unscale is None else exact.detach() * unscale.detach()
    torch.testing.assert_close(rounded * factor.detach(), expected)


def test_attention_learns_nearly_the_same_in_bfloat16(eight_bits: QuantizedAttention) -> None:
    query, key, value = torch.randn(3, 2, 2, 16, 8)
    outputs, gradients = [], []
    for precision in ("float32", "bfloat16"):
        eight_bits.zero_grad(set_to_none=True)
        given = [x.clone().requires_grad_(True) for x in (query, key, value)]
        with train.autocast(torch.device("cpu"), precision):
            outputs.append(eight_bits.attend(*given, 0.5, None))
        outputs[-1].square().mean().backward()
        gradients.append([x.grad for x in (*given, *eight_bits.parameters())])
    assert outputs[1].dtype == torch.float32
    # Eight bits of each sum, and the codes of a few probabilities that lie on an edge.
    assert snr_db(outputs[0].detach(), outputs[1].detach()) > 40
    assert len(gradients[0]) == 7
    for exact, rounded in zip(*gradients, strict=True):
        assert snr_db(exact, rounded) > 20


def test_collecting_leaves_the_denoiser_as_it_was(float_model: LoadedModel, recorded: CalibrationSet) -> None:
    denoiser = copy.deepcopy(float_model.denoiser)
    before = {name: attention.processor for name, attention in attentions(denoiser).items()}
    collect_operands(denoiser, recorded, prompts_per_step=1, values=4, seed=0)
    assert {name: attention.processor for name, attention in attentions(denoiser).items()} == before
    assert not quantized_attentions(denoiser)


def test_extremes_are_collected(samples: dict[str, Tensor], recorded: CalibrationSet) -> None:
    probabilities = samples[f"{SELF}.processor.probabilities"]
    assert probabilities.shape == (recorded.timesteps.numel(), 514)
    assert (probabilities[:, -2] <= probabilities.amin(dim=1)).all()
    assert (probabilities[:, -1] >= probabilities.amax(dim=1)).all()
    assert int(samples[f"{SELF}.processor.probabilities.keys"]) == 64


def test_a_denoiser_without_attention_is_refused(recorded: CalibrationSet, work: WorkDirectory) -> None:
    recipe = dataclasses.replace(load_recipe("w8a8"), attention_bits=8)
    with pytest.raises(ConfigError, match="attention_bits to null"):
        find_operands(nn.Linear(2, 2), recorded, recipe, work, seed=0)


def test_unknown_operands_are_refused(float_model: LoadedModel) -> None:
    q = OperandQParams(group_scale=torch.ones(1), qmin=-128, qmax=127)
    with pytest.raises(CalibrationError, match="no operand"):
        insert_attention(
            copy.deepcopy(float_model.denoiser),
            {f"{SELF}.processor.nothing": q},
            TimestepContext(torch.empty(0)),
        )


def test_scales_of_operands_learn_in_the_sensitive_phase_alone(
    float_model: LoadedModel, recorded: CalibrationSet, samples: dict[str, Tensor], traced: Trace
) -> None:
    denoiser, _ = quantized_attention_only(float_model, recorded, samples)
    names = {f"{name}.log_scale" for name in operand_quantizers(denoiser)}
    phase = PhaseConfig(layers="none", steps=1)
    assert not train.trainable(denoiser, phase, traced.roles, temporal=True)
    learned = train.learned(train.trainable(denoiser, phase, traced.roles, temporal=False))
    assert learned.keys() == names and len(names) == 4 * len(attentions(float_model.denoiser))
    sample, timestep, conditioning, target = recorded.batch(torch.tensor([0]), torch.tensor([1]))
    (predict(denoiser, sample, timestep, conditioning) - target).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learned.values())


def test_a_checkpoint_holds_quantized_attention(
    tmp_path: Path,
    float_model: LoadedModel,
    recorded: CalibrationSet,
    samples: dict[str, Tensor],
    quantize_tiny,
) -> None:
    denoiser, context = quantize_tiny(4, 8)
    insert_attention(denoiser, initialize_operands(samples, BITS, time_aware=True), context)
    freeze(denoiser)
    path = tmp_path / "checkpoint"
    with write_artifact(path, stage="checkpoint", config={}) as writer:
        save_checkpoint(
            writer.path,
            float_model,
            denoiser,
            recipe=load_recipe("w4a8"),
            activation_bits=dict.fromkeys(quantized_layers(denoiser), 8),
            context=context,
            history={},
        )
    loaded = load_checkpoint(path).denoiser
    assert operand_quantizers(loaded).keys() == operand_quantizers(denoiser).keys()
    assert torch.equal(answer(loaded, recorded), answer(denoiser, recorded))
