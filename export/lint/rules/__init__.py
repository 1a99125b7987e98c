"""The rules: each looks at one graph for one target and yields the problems it sees.

A rule's name is its function's. Its docstring numbers when it fires and when it must not. What a target refuses was
tried with the runtime itself: see ``docs/lint.md`` for the patterns and versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from quest_deploy.export.lint.rules.blocks import (
    block_scale_of_weight,
    four_bit_weight_on_the_left,
    four_bit_weight_shared,
)
from quest_deploy.export.lint.rules.codes import (
    cast_codes,
    dynamic_zero_point,
    int32_codes,
    moved_codes,
    nonzero_zero_point,
    unsigned_codes,
    unsupported_codes,
)
from quest_deploy.export.lint.rules.four_bits import (
    clip_before_rare_codes,
    code_opset,
    four_bit_activation,
    four_bit_weight_along_the_sum,
    four_bit_weight_on_convolution,
    mixed_codes,
)
from quest_deploy.export.lint.rules.problem import Problem
from quest_deploy.export.lint.rules.scales import (
    activation_scale_granularity,
    dynamic_scale,
    invalid_scale,
    mismatched_scales,
    scale_count,
    scale_opset,
    scale_type,
    weight_scale_axis,
)
from quest_deploy.export.lint.rules.structure import (
    attention_operator,
    dangling_input,
    dequantize_without_quantize,
    float_branch,
    float_stored_weight,
    moved_activation,
    quantize_without_dequantize,
    unsupported_operator,
    unsupported_type,
)
from quest_deploy.export.lint.rules.types import (
    bfloat16_attention,
    bfloat16_opset,
    double_precision,
    mixed_types,
    output_type_opset,
    packed_scale_type,
)
from quest_deploy.export.lint.view import View

Rule = Callable[[View, str], Iterator[Problem]]

RULES: tuple[Rule, ...] = (
    nonzero_zero_point,
    dynamic_zero_point,
    unsigned_codes,
    unsupported_codes,
    int32_codes,
    cast_codes,
    moved_codes,
    invalid_scale,
    dynamic_scale,
    scale_count,
    scale_opset,
    scale_type,
    packed_scale_type,
    output_type_opset,
    bfloat16_opset,
    bfloat16_attention,
    mixed_types,
    double_precision,
    mismatched_scales,
    weight_scale_axis,
    activation_scale_granularity,
    four_bit_weight_on_convolution,
    four_bit_weight_along_the_sum,
    four_bit_activation,
    code_opset,
    clip_before_rare_codes,
    four_bit_weight_on_the_left,
    four_bit_weight_shared,
    block_scale_of_weight,
    mixed_codes,
    unsupported_operator,
    unsupported_type,
    attention_operator,
    quantize_without_dequantize,
    dequantize_without_quantize,
    moved_activation,
    float_branch,
    float_stored_weight,
    dangling_input,
)
