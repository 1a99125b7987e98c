"""How a GPU multiplies float32: exactly, or in TensorFloat-32.

PyTorch lets cuDNN round the factors of float32 convolutions to 10 bits of mantissa (TF32) unless it is told not to. A
scale times a code is then another number than the one that is exported, so every rung multiplies float32 as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Products = Literal["ieee", "tf32"]


@contextmanager
def float32_products(products: Products) -> Iterator[None]:
    """Multiply float32 on GPUs as `products` says while the body runs; CPUs know one way."""
    # PyTorch makes `conv` while it runs, so its type hints know none.
    cudnn: Any = torch.backends.cudnn
    backends = (torch.backends.cuda.matmul, cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = products
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.fp32_precision = was
