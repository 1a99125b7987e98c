"""What a denoiser is told, apart from what diffusers' pipelines show."""

from __future__ import annotations

import pytest
import torch

from quest_deploy.model.conditioning import Conditioner, TextEncoders
from quest_deploy.model.families import FAMILIES
from quest_deploy.model.packing import pack, positions, unpack
from quest_deploy.model.tensors import TIMESTEP, ComponentSpec, TensorSpec, float_tensor

SDXL = FAMILIES["StableDiffusionXLPipeline"]


def conditioner(*inputs: TensorSpec, index: dict | None = None) -> Conditioner:
    spec = ComponentSpec(
        name="unet",
        inputs=(
            float_tensor("sample", "batch", 4, "height", "width"),
            float_tensor(TIMESTEP, "steps"),
            *inputs,
        ),
        outputs=(),
    )
    family = SDXL.of_index(index or {})

    def run(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        n, tokens = inputs["input_ids"].shape
        hidden = {f"hidden_states.{layer}": torch.full((n, tokens, 2), 1.0 + layer) for layer in range(4)}
        return {"text_embeds": torch.ones(n, 3), **hidden}

    encoders = TextEncoders(
        parts=family.text, tokenizers={part.name: Tokenizer() for part in family.text}, run=run
    )
    return Conditioner(family=family, classes=None, denoiser=spec, encoders=encoders, pixels_per_latent=8)


class Tokenizer:
    model_max_length = 5

    def __call__(self, prompts: list[str], max_length: int, **options: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(len(prompts), max_length, dtype=torch.int64)}


def told(of: Conditioner, height: int, width: int, *, negative: bool = False) -> dict[str, torch.Tensor]:
    latents = torch.empty(1, 4, height, width, device="meta")
    return of.complete(of.encode(["a", "b"]), latents, 5.0, negative=negative)


def test_the_last_layer_but_one_of_both_encoders_is_read() -> None:
    hidden = conditioner().encode(["a"])["encoder_hidden_states"]
    assert hidden.shape == (1, 5, 4) and (hidden == 3.0).all()


def test_no_negative_prompt_is_zeros_unless_the_model_says_otherwise() -> None:
    zeros, words = (
        conditioner(index={"force_zeros_for_empty_prompt": forced}).encode_negative(2)
        for forced in (True, False)
    )
    assert zeros is not None and words is not None
    assert all((value == 0).all() for value in zeros.values())
    assert all((value != 0).all() for value in words.values())
    given = conditioner().encode_negative(2, "ugly")
    assert given is not None and all((value != 0).all() for value in given.values())


def test_size_is_told_in_pixels() -> None:
    ids = told(conditioner(float_tensor("time_ids", "batch", 6)), 8, 16)["time_ids"]
    assert ids.tolist() == [[64, 128, 0, 0, 64, 128]] * 2


@pytest.mark.parametrize(("negative", "score"), [(False, 6.0), (True, 2.5)])
def test_a_refiner_is_told_an_aesthetic_score(negative: bool, score: float) -> None:
    ids = told(conditioner(float_tensor("time_ids", "batch", 5)), 8, 16, negative=negative)["time_ids"]
    assert ids.tolist() == [[64, 128, 0, 0, score]] * 2


def test_what_is_given_is_kept_and_nothing_else_is_added() -> None:
    of = conditioner()
    assert told(of, 8, 8).keys() == of.encode(["a"]).keys()


def test_only_optional_encoders_can_be_left_out() -> None:
    index = {"text_encoder": [None, None], "text_encoder_2": [None, None]}
    assert SDXL.of_index(index).text_encoders == ("text_encoder_2",)


def test_packing_is_undone_by_unpacking() -> None:
    latents = torch.randn(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(unpack(tokens, 4, 6), latents)
    assert torch.equal(tokens[:, 4], latents[:, :, 2:4, 2:4].flatten(1))


def test_positions_are_rows_and_columns() -> None:
    found = positions(torch.zeros(1, 3, 4, 6), torch.zeros(1, 7, 2))
    assert found["txt_ids"].shape == (7, 3) and not found["txt_ids"].any()
    assert found["img_ids"].tolist() == [[0, row, column] for row in range(2) for column in range(3)]
