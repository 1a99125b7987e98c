"""Two 4-bit codes in a byte, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_deploy.errors import ArtifactError
from quest_deploy.quantize.pack import pack_int4, unpack_int4


@settings(max_examples=50, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_packing_round_trips(shape: list[int], seed: int) -> None:
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes), shape), codes)


def test_the_first_code_of_a_pair_lies_in_the_low_half() -> None:
    assert pack_int4(torch.tensor([1, -2, 7], dtype=torch.int8)).tolist() == [0xE1, 0x07]


def test_two_codes_take_one_byte() -> None:
    assert pack_int4(torch.zeros(10, 10, dtype=torch.int8)).numel() == 50


@pytest.mark.parametrize(
    "packed",
    [torch.zeros(3, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8), torch.zeros(4, dtype=torch.int8)],
    ids=["too few", "too many", "not bytes"],
)
def test_bytes_of_another_shape_are_refused(packed: torch.Tensor) -> None:
    with pytest.raises(ArtifactError, match=r"expected 4 bytes for shape \[2, 4\]"):
        unpack_int4(packed, [2, 4])
