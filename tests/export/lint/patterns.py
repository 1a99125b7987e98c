"""Small quantized graphs: what exporters write, what runtimes refuse, and a few that nobody should write.

``PATTERNS`` maps a name to a function that makes the model. Shapes are static, sizes small, weights seeded.
"""

from __future__ import annotations

# Each registers its patterns when it is imported.
from tests.export.lint import pattern_modes, pattern_places, pattern_scales, pattern_types
from tests.export.lint.pattern_products import PATTERNS

__all__ = [
    "PATTERNS",
    "WRONG_RESULTS",
    "pattern_modes",
    "pattern_places",
    "pattern_scales",
    "pattern_types",
]

# Compiled, and computed wrongly: see test_agreement.test_openvino_computes_attention_in_bfloat16_wrongly.
WRONG_RESULTS = {("openvino", "attention_bf16")}
