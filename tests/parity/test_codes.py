"""Integer codes of torch and ONNX Runtime, compared layer by layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from quest_deploy.parity.codes import FlipReport, compare_codes, onnxruntime_codes, providers_of, torch_codes
from quest_deploy.quantize.grid import quantize
from quest_deploy.quantize.layers import ActivationQuantizer, TimestepContext


class TinyDenoiser(torch.nn.Module):
    """Two quantized products in a row, the second with two timestep groups; called like the denoiser."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.context = TimestepContext(boundaries=torch.tensor([500.0]))
        self.first = ActivationQuantizer(torch.tensor([0.05]), -128, 127)
        self.second = ActivationQuantizer(torch.tensor([0.04, 0.08]), -7, 8)
        self.register_buffer("weight", torch.linspace(-1, 1, 16).reshape(4, 4))
        self.error = error

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        self.context.set_timestep(timestep)
        hidden, _ = self.first(sample + encoder_hidden_states.mean(), self.context.group)
        quantized, unscale = self.second(hidden @ self.weight + self.error, self.context.group)
        assert unscale is not None
        return (quantized * unscale,)


def probe(timestep: float = 900.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 4, 4, generator=generator),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(2, 3, 4, generator=generator),
    }


@pytest.mark.parametrize("timestep", [900.0, 100.0])
def test_torch_codes_are_those_of_the_grid(timestep: float) -> None:
    denoiser, given = TinyDenoiser(), probe(timestep)
    shifted = given["sample"] + given["encoder_hidden_states"].mean()
    codes = torch_codes(denoiser, given).codes
    expected = quantize(shifted, torch.tensor([0.05]).log().exp().min(), -128, 127)
    assert torch.equal(codes["first"], expected) and set(codes) == {"first", "second"}


def test_codes_of_a_denoiser_agree_with_themselves() -> None:
    run = torch_codes(TinyDenoiser(), probe())
    flips = compare_codes([run], [torch_codes(TinyDenoiser(), probe(), run.codes)])
    assert isinstance(flips, FlipReport) and flips.total.differing == 0 and flips.total.places == 2 * 128


def test_forced_codes_do_not_cascade() -> None:
    run = torch_codes(TinyDenoiser(), probe())
    altered = {**run.codes, "first": torch.zeros_like(run.codes["first"])}
    chosen = torch_codes(TinyDenoiser(), probe(), altered).codes
    assert torch.equal(chosen["first"], run.codes["first"]) and not chosen["second"].any()


def test_the_layer_with_most_flips_is_named() -> None:
    run = torch_codes(TinyDenoiser(), probe())
    flips = compare_codes([run], [torch_codes(TinyDenoiser(error=0.05), probe(), run.codes)])
    assert isinstance(flips, FlipReport)
    assert flips.worst.layer == "second" and flips.layers[0].flips.differing == 0
    assert 0 < flips.worst.flips.fraction <= 1 and flips.worst.flips.max_difference >= 1


def test_hooks_are_taken_off_again() -> None:
    denoiser = TinyDenoiser()
    torch_codes(denoiser, probe())
    assert not denoiser.first._forward_hooks and not denoiser.second._forward_hooks


def test_layers_without_counterpart_are_counted_apart() -> None:
    run = torch_codes(TinyDenoiser(), probe())
    other = {"first": run.codes["first"], "other": run.codes["second"]}
    flips = compare_codes([run], [replace(run, codes=other)])
    assert isinstance(flips, FlipReport) and flips.unmatched == ("other", "second")


def test_a_quantizer_that_the_graph_shares_has_a_counterpart() -> None:
    run = torch_codes(TinyDenoiser(), probe())
    twins = replace(run, codes={**run.codes, "twin": run.codes["first"].clone()})
    flips = compare_codes([twins], [run])
    assert isinstance(flips, FlipReport) and flips.unmatched == ()


def test_codes_without_a_common_layer_cannot_be_compared() -> None:
    run = torch_codes(TinyDenoiser(), probe())
    assert "no quantizer of the same name" in str(compare_codes([run], [replace(run, codes={})]))


def qdq_graph(path: Path, error: float = 0.0) -> Path:
    """The graph of `TinyDenoiser` in its first timestep group, written by hand."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    denoiser = TinyDenoiser()
    first, second = (q.tables() for q in (denoiser.first, denoiser.second))
    constants = {
        "zero": np.array(0, np.int8),
        "error": np.array(error, np.float32),
        "s1": first[0].detach().numpy(),
        "s2": second[0].detach().numpy(),
        "r2": second[1].detach()[1].numpy(),
        "unscale": second[2].detach()[1].numpy(),
        "low": (second[0] * -7).detach().numpy(),
        "high": (second[0] * 8).detach().numpy(),
        "weight": denoiser.weight.numpy(),
    }
    nodes = [
        helper.make_node("ReduceMean", ["encoder_hidden_states"], ["mean"], keepdims=0),
        helper.make_node("Add", ["sample", "mean"], ["shifted"]),
        helper.make_node("QuantizeLinear", ["shifted", "s1", "zero"], ["first/codes"]),
        helper.make_node("DequantizeLinear", ["first/codes", "s1"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "weight"], ["product"]),
        helper.make_node("Add", ["product", "error"], ["moved"]),
        helper.make_node("Mul", ["moved", "r2"], ["rescaled"]),
        helper.make_node("Clip", ["rescaled", "low", "high"], ["clipped"]),
        helper.make_node("QuantizeLinear", ["clipped", "s2", "zero"], ["second/codes"]),
        helper.make_node("DequantizeLinear", ["second/codes", "s2"], ["values"]),
        helper.make_node("Mul", ["values", "unscale"], ["out_sample"]),
    ]
    shapes = {"sample": ["n", 4, "h", "w"], "timestep": [1], "encoder_hidden_states": ["n", "l", 4]}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_onnxruntime_chooses_the_codes_of_torch(tmp_path: Path) -> None:
    run = torch_codes(TinyDenoiser(), probe())
    chosen = onnxruntime_codes(qdq_graph(tmp_path / "model.onnx"), [probe()], [run.codes])
    assert not isinstance(chosen, str)
    flips = compare_codes([run], chosen)
    assert isinstance(flips, FlipReport) and flips.total.places == 256 and flips.total.differing == 0
    assert flips.noise_snr_db.min() > 100


class OnGpu(Tensor):
    """A tensor that NumPy cannot look into before it is on the CPU."""

    def numpy(self) -> None:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


def test_probes_may_lie_on_a_gpu(tmp_path: Path) -> None:
    graph = qdq_graph(tmp_path / "model.onnx")
    (here,) = onnxruntime_codes(graph, [probe()])
    (there,) = onnxruntime_codes(graph, [{name: one.as_subclass(OnGpu) for name, one in probe().items()}])
    assert all(torch.equal(here.codes[name], there.codes[name]) for name in here.codes)


@pytest.mark.parametrize("wrapped", [False, True])
def test_codes_are_taken_with_the_options_that_the_provider_draws_with(wrapped: bool) -> None:
    """By default CUDA rounds float32 to TensorFloat-32, which flips codes that do not flip where it draws."""
    session = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    engine = SimpleNamespace(session=session, device=torch.device("cuda", 1))
    cuda = ("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})
    assert providers_of(SimpleNamespace(engine=engine) if wrapped else engine) == [
        cuda,
        "CPUExecutionProvider",
    ]


def test_a_damaged_graph_flips_codes(tmp_path: Path) -> None:
    run = torch_codes(TinyDenoiser(), probe())
    chosen = onnxruntime_codes(qdq_graph(tmp_path / "model.onnx", error=0.05), [probe()], [run.codes])
    assert not isinstance(chosen, str)
    flips = compare_codes([run], chosen)
    assert isinstance(flips, FlipReport) and flips.worst.layer == "second" and flips.worst.flips.differing > 0


def test_a_graph_that_quantizes_elsewhere_is_named(tmp_path: Path) -> None:
    run = torch_codes(TinyDenoiser(), probe())
    reason = onnxruntime_codes(qdq_graph(tmp_path / "model.onnx"), [probe()], [{"first": run.codes["first"]}])
    assert reason == "the graph quantizes at second, where the rung above does not"


def test_given_codes_keep_a_flip_out_of_the_noise_prediction() -> None:
    run = torch_codes(TinyDenoiser(), probe())
    damaged = TinyDenoiser(error=0.05)
    given, alone = torch_codes(damaged, probe(), run.codes), torch_codes(damaged, probe())
    assert torch.equal(given.output, run.output) and not torch.equal(alone.output, run.output)


def test_another_component_is_counted_under_its_name_and_its_output_kept_apart() -> None:
    run = torch_codes(TinyDenoiser(), probe())
    text = replace(run, component="text_encoder")
    moved = replace(text, codes={**run.codes, "first": run.codes["first"] + 1}, output=1.1 * run.output)
    flips = compare_codes([run, text], [run, moved])
    assert isinstance(flips, FlipReport)
    assert [layer.layer for layer in flips.layers if layer.flips.differing] == ["text_encoder.first"]
    assert tuple(flips.noise_snr_db.shape) == (1, 2) and bool(flips.noise_snr_db.isposinf().all())
    torch.testing.assert_close(
        flips.companions_snr_db["text_encoder"], torch.full((2,), 20.0).double(), atol=1e-4, rtol=0
    )


def test_a_component_in_full_precision_is_left_out() -> None:
    run = torch_codes(TinyDenoiser(), probe())
    text = replace(run, component="text_encoder", codes={})
    flips = compare_codes([run, text], [run, text])
    assert isinstance(flips, FlipReport) and not flips.companions_snr_db and len(flips.layers) == 2
