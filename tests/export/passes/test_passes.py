"""Every pass: a case where it must fire, and one where it must not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from quest_deploy.errors import ExportError
from quest_deploy.export.passes.canonical_names import SCOPES_KEY, CanonicalNames
from quest_deploy.export.passes.expand_timestep import ExpandTimestep
from quest_deploy.export.passes.fold_weight_transpose import FoldWeightTranspose
from quest_deploy.export.passes.name_dimensions import NameDimensions
from quest_deploy.export.passes.pack_int4 import PackInt4
from quest_deploy.export.passes.remove_no_ops import RemoveNoOps
from quest_deploy.export.passes.strip_metadata import StripMetadata
from quest_deploy.export.passes.unshare_dequantize import UnshareDequantize
from quest_deploy.model.spec import ComponentSpec, TensorSpec

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
# In pieces, because no file may hold an absolute path.
HOME = "/".join(("", "home", "someone"))
SCALE = np.array([0.5, 0.25, 2.0], dtype=np.float32)
CODES = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)


def graph(text: str, **initializers: np.ndarray) -> ir.Model:
    tensors = [ir.tensor(value, name=name) for name, value in initializers.items()]
    return ir.from_onnx_text(HEADER + text, initializers=tensors)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    return ReferenceEvaluator(ir.to_proto(model)).run(None, inputs)


X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)

TRANSPOSED = """
transposed (float[n, 4] x) => (float[n, 3] y) {
    w = DequantizeLinear<axis = 0>(codes, scale)
    t = Transpose<perm = [1, 0]>(w)
    y = MatMul(x, t)
}"""
QUANTIZED_GEMM = """
gemm (int8[n, 4] q) => (float[n, 3] y) {
    x = DequantizeLinear(q, one)
    w = DequantizeLinear<axis = 0>(codes, scale)
    y = Gemm<transB = 1>(x, w)
}"""
ONE = np.array(0.5, dtype=np.float32)


class TestFoldWeightTranspose:
    def test_folds_a_transpose_into_the_codes(self) -> None:
        model = graph(TRANSPOSED, codes=CODES, scale=SCALE)
        before = run(model, x=X)[0]
        assert FoldWeightTranspose()(model).modified
        assert operators(model) == ["DequantizeLinear", "MatMul"]
        np.testing.assert_array_equal(run(model, x=X)[0], before)

    def test_turns_a_quantized_gemm_into_a_matmul(self) -> None:
        model = graph(QUANTIZED_GEMM, codes=CODES, scale=SCALE, one=ONE)
        before = run(model, q=np.ones((2, 4), dtype=np.int8))[0]
        assert FoldWeightTranspose()(model).modified
        assert operators(model) == ["DequantizeLinear", "DequantizeLinear", "MatMul"]
        assert [output.name for output in model.graph.outputs] == ["y"]
        np.testing.assert_array_equal(run(model, q=np.ones((2, 4), dtype=np.int8))[0], before)

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(
                TRANSPOSED.replace(
                    "y = MatMul(x, t)", "p = MatMul(x, t)\n z = MatMul(x, t)\n y = Add(p, z)"
                ).replace("t = Transpose", "u = Neg(w)\n t = Transpose"),
                id="the-weight-has-another-reader",
            ),
            pytest.param(
                TRANSPOSED.replace("(codes, scale)", "(computed, scale)").replace(
                    "w = Deq", "computed = Identity(codes)\n w = Deq"
                ),
                id="codes-are-computed",
            ),
            pytest.param(
                TRANSPOSED.replace("codes, scale)\n", "codes, scale)\n again = Cast<to = 1>(codes)\n"),
                id="codes-have-another-reader",
            ),
        ],
    )
    def test_leaves(self, text: str) -> None:
        model = graph(text, codes=CODES, scale=SCALE)
        assert not FoldWeightTranspose()(model).modified
        assert "Transpose" in operators(model)

    def test_leaves_a_gemm_with_a_bias(self) -> None:
        model = graph(
            QUANTIZED_GEMM.replace("(x, w)", "(x, w, bias)"), codes=CODES, scale=SCALE, one=ONE, bias=SCALE
        )
        assert not FoldWeightTranspose()(model).modified

    def test_turns_a_gemm_of_floats_and_codes_into_a_matmul(self) -> None:
        text = QUANTIZED_GEMM.replace("int8[n, 4] q", "float[n, 4] x").replace(
            "x = DequantizeLinear(q, one)\n", ""
        )
        model = graph(text, codes=CODES, scale=SCALE)
        (expected,) = run(model, x=X)
        assert FoldWeightTranspose()(model).modified
        assert operators(model) == ["DequantizeLinear", "MatMul"]
        assert np.array_equal(run(model, x=X)[0], expected)

    def test_leaves_a_gemm_of_floats(self) -> None:
        text = "g (float[n, 4] x) => (float[n, 3] y) { y = Gemm<transB = 1>(x, weight) }"
        assert not FoldWeightTranspose()(graph(text, weight=CODES.astype(np.float32))).modified


WEIGHT = """
weight () => (float[3, 4] y) {
    y = DequantizeLinear<axis = 0>(codes, scale)
}"""


class TestPackInt4:
    def test_packs_what_fits_without_changing_a_value(self) -> None:
        model = graph(WEIGHT, codes=CODES, scale=SCALE)
        before = run(model)[0]
        assert PackInt4()(model).modified
        assert operators(model) == ["Cast", "DequantizeLinear"]
        assert model.graph.initializers["codes"].const_value.nbytes == CODES.size // 2
        # What lowers precision must know every type.
        assert all(
            value.dtype is not None
            for node in model.graph
            for value in node.outputs[:1]
            if node.op_type == "Cast"
        )
        np.testing.assert_array_equal(run(model)[0], before)

    def test_packs_shared_codes_once(self) -> None:
        text = WEIGHT.replace("float[3, 4] y)", "float[3, 4] y, float[3, 4] z)").replace(
            "\n}", "\n    z = DequantizeLinear<axis = 0>(codes, scale)\n}"
        )
        model = graph(text, codes=CODES, scale=SCALE)
        assert PackInt4()(model).modified
        assert operators(model).count("Cast") == 1

    def test_leaves_codes_that_need_eight_bits(self) -> None:
        assert not PackInt4()(graph(WEIGHT, codes=CODES * np.int8(2), scale=SCALE)).modified

    def test_leaves_codes_that_something_else_reads(self) -> None:
        text = WEIGHT.replace("\n}", "\n    z = Cast<to = 1>(codes)\n}")
        assert not PackInt4()(graph(text, codes=CODES, scale=SCALE)).modified

    def test_leaves_zero_points(self) -> None:
        text = "q (float[n] x) => (int8[n] y) {\n    y = QuantizeLinear(x, one, zero)\n}"
        assert not PackInt4()(graph(text, one=ONE, zero=np.array(0, dtype=np.int8))).modified


SHARED = """
shared (int8[n, 4] q) => (float[n, 4] y) {
    x = DequantizeLinear(q, one)
    a = Neg(x)
    y = Add(a, x)
}"""


class TestUnshareDequantize:
    def test_gives_each_reader_its_own(self) -> None:
        model = graph(SHARED, one=ONE)
        assert UnshareDequantize()(model).modified
        assert operators(model).count("DequantizeLinear") == 2
        assert all(
            len(node.outputs[0].uses()) == 1 for node in model.graph if node.op_type == "DequantizeLinear"
        )

    def test_leaves_one_reader(self) -> None:
        text = WEIGHT.replace("y = D", "w = D").replace("\n}", "\n    y = Neg(w)\n}")
        assert not UnshareDequantize()(graph(text, codes=CODES, scale=SCALE)).modified

    def test_leaves_a_graph_output(self) -> None:
        model = graph(SHARED.replace("(float[n, 4] y)", "(float[n, 4] y, float[n, 4] x)"), one=ONE)
        assert not UnshareDequantize()(model).modified


DENOISER = """
denoiser (float[s53, 4] sample, float[s53] timestep) => (float[s53, 4] y) {
    t = Unsqueeze(timestep, axis)
    y = Mul(sample, t)
}"""
AXIS = np.array([1], dtype=np.int64)


class TestExpandTimestep:
    @pytest.mark.parametrize("steps", [1, 3])
    def test_one_timestep_or_one_a_sample(self, steps: int) -> None:
        model = graph(DENOISER, axis=AXIS)
        assert ExpandTimestep()(model).modified
        assert str(model.graph.inputs[1].shape[0]) == "steps"
        timestep = np.arange(1, steps + 1, dtype=np.float32)
        got = run(model, sample=np.ones((3, 4), dtype=np.float32), timestep=timestep)[0]
        np.testing.assert_array_equal(got, np.broadcast_to(timestep[:, None], (3, 4)))

    def test_fires_once(self) -> None:
        model = graph(DENOISER, axis=AXIS)
        ExpandTimestep()(model)
        assert not ExpandTimestep()(model).modified

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(DENOISER.replace("timestep", "time"), id="no-timestep"),
            pytest.param(
                DENOISER.replace("sample, float[s53] timestep", "sample, float[s53] t0, float[s53] timestep"),
                id="not-the-second",
            ),
            pytest.param(DENOISER.replace("float[s53] timestep", "float[s53, 1] timestep"), id="rank-2"),
            pytest.param(DENOISER.replace("(timestep, axis)", "(sample, axis)"), id="unread"),
        ],
    )
    def test_leaves(self, text: str) -> None:
        assert not ExpandTimestep()(graph(text, axis=AXIS)).modified


SPEC = ComponentSpec(
    name="unet",
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 4)),),
)
SYMBOLS = "symbols (float[s53, 4] x) => (float[s53, 4] y) {\n    y = Neg(x)\n}"


class TestNameDimensions:
    def test_takes_the_names_of_the_specification(self) -> None:
        model = graph(SYMBOLS)
        assert NameDimensions(SPEC)(model).modified
        assert [str(size) for size in model.graph.outputs[0].shape] == ["batch", "4"]

    def test_leaves_names_that_fit(self) -> None:
        assert not NameDimensions(SPEC)(graph(SYMBOLS.replace("s53", "batch"))).modified

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("[s53, 4] x", "[2, 4] x"),
            ("[s53, 4] x", "[s53, 5] x"),
            ("[s53, 4] x", "[s53] x"),
            ("Neg(x)", "Neg(z)"),
        ],
    )
    def test_refuses_a_specialized_graph(self, old: str, new: str) -> None:
        text = SYMBOLS.replace(old, new)
        if "z" in new:
            text = text.replace("] x)", "] z)")
        with pytest.raises(ExportError, match="unet"):
            NameDimensions(SPEC).call(graph(text))


class TestRemoveNoOps:
    @pytest.mark.parametrize("no_op", ["Identity(x)", "Cast<to = 1>(x)"])
    def test_removes(self, no_op: str) -> None:
        model = graph(f"no_op (float[n] x) => (float[n] y) {{\n    a = {no_op}\n    y = Neg(a)\n}}")
        assert RemoveNoOps()(model).modified
        assert operators(model) == ["Neg"]

    @pytest.mark.parametrize("shape", [[-1], [3]])
    def test_removes_a_reshape_of_an_initializer_to_its_shape(self, shape: list[int]) -> None:
        text = (
            "no_op (float[n, 3] x) => (float[n, 3] y) {\n    a = Reshape(bias, shape)\n    y = Add(x, a)\n}"
        )
        model = graph(text, bias=SCALE, shape=np.array(shape))
        assert RemoveNoOps()(model).modified
        assert operators(model) == ["Add"]

    @pytest.mark.parametrize("shape", [[1, 3], [3, 1]])
    def test_leaves_a_reshape_to_another_shape(self, shape: list[int]) -> None:
        text = (
            "reshape (float[n, 3] x) => (float[n, 3] y) {\n    a = Reshape(bias, shape)\n    y = Add(x, a)\n}"
        )
        assert not RemoveNoOps()(graph(text, bias=SCALE, shape=np.array(shape))).modified

    def test_keeps_the_name_of_an_output(self) -> None:
        model = graph("no_op (float[n] x) => (float[n] y) {\n    a = Neg(x)\n    y = Identity(a)\n}")
        assert RemoveNoOps()(model).modified
        assert operators(model) == ["Neg"] and model.graph.outputs[0].name == "y"

    def test_leaves_a_cast_to_another_type(self) -> None:
        assert not RemoveNoOps()(
            graph("c (float[n] x) => (double[n] y) {\n    y = Cast<to = 11>(x)\n}")
        ).modified

    def test_leaves_an_identity_from_input_to_output(self) -> None:
        assert not RemoveNoOps()(graph("i (float[n] x) => (float[n] y) {\n    y = Identity(x)\n}")).modified


class TestStripMetadata:
    def test_removes_traces_and_shapes(self) -> None:
        model = graph("m (float[n] x) => (float[n] y) {\n    a = Neg(x)\n    y = Abs(a)\n}")
        node = model.graph[0]
        node.metadata_props["pkg.torch.onnx.stack_trace"] = f'File "{HOME}/model.py"'
        node.doc_string = model.doc_string = HOME
        node.outputs[0].shape = ir.Shape(["s53"])
        assert StripMetadata()(model).modified
        assert b"someone" not in ir.to_proto(model).SerializeToString()
        assert node.outputs[0].shape is None

    def test_keeps_rank_where_nothing_infers_it(self) -> None:
        model = graph(
            "g (float[n, 4, 2] x) => (float[n, 4, 2] y) {\n"
            "    a = GroupNormalization<num_groups = 2>(x, s, s)\n    y = Neg(a)\n}",
            s=np.ones(4, dtype=np.float32),
        )
        model.graph[0].outputs[0].shape = ir.Shape(["s53", 4, 2])
        StripMetadata()(model)
        shape = model.graph[0].outputs[0].shape
        assert shape is not None and shape[1:] == (4, 2) and shape[0] != "s53"

    def test_leaves_a_clean_graph(self) -> None:
        model = graph("m (float[n] x) => (float[n] y) {\n    y = Neg(x)\n}")
        assert not StripMetadata()(model).modified


class TestCanonicalNames:
    def test_names_by_module_and_order(self) -> None:
        model = graph(
            "m (float[n] x) => (float[n] y) {\n"
            "    q_7 = QuantizeLinear(x, val_3, val_9)\n    d_8 = DequantizeLinear(q_7, val_3)\n    y = Neg(d_8)\n}",
            val_9=np.array(0, dtype=np.int8),
            val_3=ONE,
        )
        scopes = "['', 'unet', 'unet.conv.quantizer', 'quantize_dequantize']"
        for node in list(model.graph)[:2]:
            node.metadata_props[SCOPES_KEY] = scopes
        assert CanonicalNames()(model).modified
        assert [node.name for node in model.graph] == [
            "unet.conv.quantizer/QuantizeLinear",
            "unet.conv.quantizer/DequantizeLinear",
            "Neg",
        ]
        assert [node.outputs[0].name for node in model.graph] == ["unet.conv.quantizer/codes", "v0", "y"]
        assert list(model.graph.initializers) == ["c0", "c1"]

    def test_keeps_parameters_inputs_and_outputs(self) -> None:
        model = graph("m (float[n] x) => (float[n] y) {\n    y = Mul(x, w)\n}", w=ONE)
        weight = model.graph.initializers.pop("w")
        weight.name = "unet.conv.weight"
        model.graph.initializers["unet.conv.weight"] = weight
        CanonicalNames()(model)
        assert list(model.graph.initializers) == ["unet.conv.weight"]
        assert [model.graph.inputs[0].name, model.graph.outputs[0].name] == ["x", "y"]

    def test_changes_nothing_the_second_time(self) -> None:
        model = graph("m (float[n] x) => (float[n] y) {\n    a = Mul(x, w)\n    y = Neg(a)\n}", w=ONE)
        CanonicalNames()(model)
        assert not CanonicalNames()(model).modified
