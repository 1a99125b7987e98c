"""Every rule where it must fire, and where it must not."""

from __future__ import annotations

import pytest

from quest_deploy.export.lint.rules import RULES
from tests.export.lint.conftest import Lint
from tests.export.lint.patterns import PATTERNS

RTX, ORT, OV = "tensorrt-rtx", "onnxruntime", "openvino"
ERROR, WARNING, INFO = "error", "warning", "info"
BREAKS = "breaks"

# rule -> (pattern, target, severity or "breaks").
FIRES: dict[str, list[tuple[str, str, str]]] = {
    "nonzero-zero-point": [
        ("conv_w8a8_zero_point", RTX, BREAKS),
        ("conv_w8a8_zero_point", "tensorrt", BREAKS),
        ("conv_w8a8_weight_zero_point", RTX, BREAKS),
        ("matmul_w4_block64_zero", RTX, BREAKS),
        ("conv_w8_uint8_128", RTX, BREAKS),
    ],
    "dynamic-zero-point": [
        ("conv_dynamic_zero_point", RTX, BREAKS),
        ("conv_dynamic_zero_point", ORT, WARNING),
    ],
    "unsigned-codes": [
        ("conv_w8_uint8_zero", RTX, ERROR),
        ("no_zero_point_input", RTX, ERROR),
        ("conv_uint8_weight", RTX, BREAKS),
        ("uint8_input", RTX, BREAKS),
    ],
    "unsupported-codes": [("conv_w8_int16", RTX, BREAKS), ("matmul_uint4_block64", RTX, BREAKS)],
    "int32-codes": [("conv_int32_bias", RTX, BREAKS), ("int32_table", RTX, BREAKS)],
    "cast-codes": [("matmul_int4_cast_to_int8", RTX, BREAKS)],
    "moved-codes": [("weight_codes_transposed", RTX, BREAKS), ("codes_transposed", ORT, WARNING)],
    "invalid-scale": [
        ("conv_scale_zero", RTX, BREAKS),
        ("conv_scale_negative", RTX, BREAKS),
        ("matmul_weight_scale_nan", RTX, BREAKS),
        ("matmul_weight_scale_inf", RTX, ERROR),
        ("conv_scale_zero", ORT, ERROR),
    ],
    "dynamic-scale": [
        ("conv_dynamic_scale", RTX, BREAKS),
        ("conv_table_scale", RTX, BREAKS),
        ("matmul_dynamic_scale", RTX, WARNING),
        ("conv_dynamic_scale", OV, WARNING),
    ],
    "scale-count": [("scale_count_wrong", target, BREAKS) for target in (RTX, ORT, OV)],
    "scale-opset": [("conv_w8a8_channel_opset12", target, BREAKS) for target in (ORT, OV)],
    "scale-type": [
        ("half_scale_of_float_data", RTX, BREAKS),
        ("fp16_float_scale_without_output_type", RTX, BREAKS),
        ("double_scale", ORT, BREAKS),
    ],
    "packed-scale-type": [
        ("mode_int4_fp16_float_scale", RTX, BREAKS),
        ("mode_int4_fp32_half_scale", RTX, BREAKS),
        ("mode_int4_channel_fp16_gemm", RTX, BREAKS),
        ("mode_int4_fp16_float_scale", ORT, BREAKS),
        ("mode_int8_alone_fp16", ORT, BREAKS),
    ],
    "output-type-opset": [
        ("mode_int8_fp16_opset22", ORT, BREAKS),
        ("mode_int8_fp16_opset22", RTX, WARNING),
        ("quantize_output_type_opset19", ORT, BREAKS),
    ],
    "bfloat16-opset": [("float_conv_bf16_opset21", ORT, BREAKS), ("float_conv_bf16_opset21", RTX, WARNING)],
    "bfloat16-attention": [("attention_bf16", OV, BREAKS), ("attention_softmax_float_bf16", OV, BREAKS)],
    "mixed-types": [
        *(("mixed_add", target, BREAKS) for target in (RTX, ORT, OV)),
        ("mixed_matmul", RTX, BREAKS),
        ("mixed_conv", RTX, BREAKS),
    ],
    "double-precision": [
        ("double_sqrt", RTX, WARNING),
        ("float_matmul_double", OV, WARNING),
        ("float_conv_double", ORT, BREAKS),
    ],
    "mismatched-scales": [("conv_other_scale_behind", RTX, WARNING)],
    "weight-scale-axis": [("conv_w8_axis1_a8", RTX, WARNING), ("matmul_w8_axis0_a8", ORT, BREAKS)],
    "activation-scale-granularity": [
        ("conv_activation_per_channel", RTX, WARNING),
        ("matmul_activation_per_token", ORT, WARNING),
        ("activation_in_blocks", OV, WARNING),
    ],
    "four-bit-weight-on-convolution": [
        ("conv_w4a8", RTX, BREAKS),
        ("conv_w4_only", RTX, WARNING),
        ("conv_w4a8", ORT, WARNING),
    ],
    "four-bit-weight-along-the-sum": [("matmul_w4_axis0_a8", OV, BREAKS)],
    "four-bit-activation": [
        ("conv_w8a4", RTX, BREAKS),
        ("attention_int4", RTX, BREAKS),
        ("matmul_w8a4", RTX, WARNING),
        ("matmul_w8a4", OV, BREAKS),
    ],
    "code-opset": [("matmul_w4_opset19", ORT, BREAKS), ("matmul_w4_opset19", RTX, WARNING)],
    "clip-before-rare-codes": [("clip_before_int4", ORT, BREAKS)],
    "four-bit-weight-on-the-left": [("matmul_int4_weight_first", RTX, BREAKS)],
    "four-bit-weight-shared": [("int4_block_weight_shared", RTX, BREAKS)],
    "block-scale-of-weight": [
        ("matmul_w4_block64_a8", RTX, BREAKS),
        ("conv_w4_block", RTX, BREAKS),
        ("matmul_w4_block48", RTX, BREAKS),
        ("matmul_w4_block64_k96", RTX, ERROR),
        ("matmul_w8_block64_a8", ORT, BREAKS),
        ("matmul_w4_block64_n", OV, BREAKS),
    ],
    "mixed-codes": [("matmul_w4_tensor_a8", RTX, BREAKS), ("matmul_w4_channel_a8", RTX, WARNING)],
    "unsupported-operator": [
        ("qlinear_conv", RTX, BREAKS),
        ("matmul_dynamic_quantize", RTX, BREAKS),
        ("matmul_nbits", RTX, BREAKS),
        ("qlinear_conv", OV, BREAKS),
    ],
    "unsupported-type": [
        ("conv_bf16", ORT, BREAKS),
        ("type_given_twice", ORT, BREAKS),
        ("bf16_add", ORT, BREAKS),
    ],
    "attention-operator": [("attention_operator", RTX, BREAKS)],
    "quantize-without-dequantize": [
        ("quantize_cast", RTX, WARNING),
        ("quantize_without_dequantize", OV, WARNING),
    ],
    "dequantize-without-quantize": [("dequantize_without_quantize", RTX, WARNING)],
    "moved-activation": [("activation_transposed", ORT, BREAKS)],
    "float-branch": [("residual_float_branch", RTX, INFO), ("concat_float_branch", RTX, INFO)],
    "float-stored-weight": [("conv_weight_quantized_in_graph", RTX, INFO)],
}
# rule -> (pattern, target) that come close.
SILENT: dict[str, list[tuple[str, str]]] = {
    "nonzero-zero-point": [("conv_w8a8", RTX), ("conv_w8a8_zero_point", ORT)],
    "dynamic-zero-point": [("conv_w8a8", RTX), ("output_dtype_int8", RTX)],
    "unsigned-codes": [("output_dtype_int8", RTX), ("conv_w8_uint8_zero", ORT), ("conv_w8a8", RTX)],
    "unsupported-codes": [("matmul_w4_block64", RTX), ("conv_w8_int16", ORT), ("conv_fp8", RTX)],
    "int32-codes": [("conv_int32_bias", ORT), ("conv_w8a8_bias", RTX)],
    "cast-codes": [("matmul_int4_cast_to_int8", ORT), ("matmul_w4_channel_a8", RTX)],
    "moved-codes": [
        ("matmul_weight_transposed", RTX),
        ("codes_transposed", RTX),
        ("weight_codes_transposed", ORT),
    ],
    "invalid-scale": [("conv_w8a8", RTX), ("conv_dynamic_scale", RTX)],
    "dynamic-scale": [("conv_computed_constant_scale", RTX), ("matmul_time_aware", RTX)],
    "scale-count": [
        ("scale_of_one_element", RTX),
        ("matmul_w4_block64", RTX),
        ("conv_activation_per_channel", RTX),
    ],
    "scale-opset": [
        ("conv_w8a8_opset13", ORT),
        ("conv_w8a8_opset10", ORT),
        ("conv_w8a8_channel_opset12", RTX),
    ],
    "scale-type": [("conv_fp16_float_scale", RTX), ("conv_fp16_casts", ORT), ("double_scale", RTX)],
    "packed-scale-type": [
        ("mode_int4_fp16", RTX),
        ("mode_int8_alone_fp16", RTX),
        ("mode_int8_alone_fp16_cast", ORT),
        ("mode_int8_alone_fp16_half_scale", ORT),
        ("mode_int8_fp16", ORT),
        ("mode_int4_fp16_float_scale", OV),
    ],
    "output-type-opset": [("mode_int8_fp16", ORT), ("output_dtype_int8", ORT), ("conv_w8a8_opset13", ORT)],
    "bfloat16-opset": [
        ("float_conv_bf16_opset22", ORT),
        ("float_matmul_bf16", RTX),
        ("float_conv_fp16", ORT),
    ],
    "bfloat16-attention": [
        ("attention_bf16", RTX),
        ("attention_qkv_softmax", OV),
        ("mode_int8_bf16", OV),
    ],
    "mixed-types": [
        ("mode_int8_fp16", RTX),
        ("fp16_add", ORT),
        ("half_scale_of_float_data", RTX),
        ("float_matmul_double", RTX),
    ],
    "double-precision": [("double_input", RTX), ("double_constant", OV), ("float_matmul_double", ORT)],
    "mismatched-scales": [("conv_w8a8", RTX), ("conv_dynamic_scale", RTX), ("conv_scale_nan", RTX)],
    "weight-scale-axis": [
        ("conv_w8a8", RTX),
        ("matmul_weight_transposed", ORT),
        ("gemm_w8a8", RTX),
        ("gemm_w8a8_not_transposed", RTX),
        ("conv_transpose", RTX),
    ],
    "activation-scale-granularity": [
        ("conv_w8a8", RTX),
        ("conv_activation_per_channel", OV),
        ("matmul_w8_only", RTX),
    ],
    "four-bit-weight-on-convolution": [("matmul_w4_block64", RTX), ("conv_w8a8", RTX)],
    "four-bit-weight-along-the-sum": [
        ("matmul_w4_axis0_a8", RTX),
        ("matmul_w4_channel_a8", OV),
        ("matmul_w4_block64", OV),
    ],
    "four-bit-activation": [("conv_w4_only", RTX), ("matmul_w8a8_clip", RTX)],
    "code-opset": [("matmul_w4_channel", ORT), ("conv_w8a8_opset13", ORT)],
    "clip-before-rare-codes": [("conv_w8a8_clip", ORT), ("clip_before_int4", RTX)],
    "four-bit-weight-on-the-left": [
        ("matmul_int4_channel_weight_first", RTX),
        ("matmul_int8_block_weight_first", RTX),
        ("matmul_w4_block64", RTX),
    ],
    "four-bit-weight-shared": [("shared_dequantize", RTX), ("int4_block_weight_shared", ORT)],
    "block-scale-of-weight": [
        ("matmul_w4_block64", RTX),
        ("matmul_w4_block128_a8", RTX),
        ("gemm_w4_block64_a8_not_transposed", RTX),
        ("matmul_w4_channel_a8", RTX),
        ("matmul_w4_block64_a8", ORT),
    ],
    "mixed-codes": [("matmul_w8a8", RTX), ("conv_w8_uint8_zero", RTX), ("matmul_w4_tensor_a8", ORT)],
    "unsupported-operator": [("conv_w8a8", RTX), ("microsoft_domain", RTX), ("qlinear_matmul", OV)],
    "unsupported-type": [
        ("conv_bf16", RTX),
        ("conv_fp16", ORT),
        ("output_dtype_int8", ORT),
        ("bf16_cast_alone", ORT),
    ],
    "attention-operator": [
        ("attention_operator_fp16", RTX),
        ("attention_qkv_softmax", RTX),
        ("attention_operator", ORT),
        ("attention_operator_of_onnxruntime", RTX),
    ],
    "quantize-without-dequantize": [("codes_transposed", RTX), ("conv_w8a8", RTX), ("qlinear_conv", ORT)],
    "dequantize-without-quantize": [("conv_w8_only", RTX), ("codes_transposed", RTX), ("qlinear_conv", ORT)],
    "moved-activation": [
        ("activation_transposed", RTX),
        ("matmul_weight_transposed", ORT),
        ("conv_w8a8", ORT),
    ],
    "float-branch": [("residual_quantized", RTX), ("shared_dequantize", RTX), ("conv_w8a8_bias", RTX)],
    "float-stored-weight": [("conv_w8a8", RTX), ("conv_weight_in_constant_node", RTX)],
}
# Tested with graphs that no runtime's test may see.
ELSEWHERE = {"dangling-input"}


def test_every_rule_is_tested_both_ways() -> None:
    names = {rule.__name__.replace("_", "-") for rule in RULES}
    assert names - ELSEWHERE == set(FIRES) == set(SILENT)


@pytest.mark.parametrize(
    ("rule", "pattern", "target", "severity"),
    [(rule, *case) for rule, cases in FIRES.items() for case in cases],
)
def test_fires(rule: str, pattern: str, target: str, severity: str, lint_model: Lint) -> None:
    found = [item for item in lint_model(PATTERNS[pattern](), target).findings if item.rule == rule]
    assert found
    assert found[0].breaks == (severity == BREAKS)
    assert found[0].severity == (ERROR if severity == BREAKS else severity)
    assert found[0].node


@pytest.mark.parametrize(
    ("rule", "pattern", "target"), [(rule, *case) for rule, cases in SILENT.items() for case in cases]
)
def test_does_not_fire(rule: str, pattern: str, target: str, lint_model: Lint) -> None:
    assert rule not in {item.rule for item in lint_model(PATTERNS[pattern](), target).findings}
