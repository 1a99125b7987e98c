"""How GPUs multiply float32; the settings themselves, since there is no GPU here to multiply on."""

from __future__ import annotations

import pytest
import torch

from quest_deploy.model.products import Products, float32_products


def now() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize("products", ["ieee", "tf32"])
def test_matrix_products_and_convolutions_are_told(products: Products) -> None:
    with float32_products(products):
        assert now() == (products, products)


def test_the_settings_of_before_are_put_back_after_an_error() -> None:
    before = now()
    with pytest.raises(ValueError, match="stop"), float32_products("ieee"):
        raise ValueError("stop")
    assert now() == before
