"""From prompts, classes or nothing to what a denoiser is told: the same code for calibration and for generation."""

from quest_deploy.model.conditioning.conditioner import Conditioner
from quest_deploy.model.conditioning.text import (
    Outputs,
    TextEncoders,
    load_tokenizer,
    token_limit,
    tokenize,
    tokens_of,
)

__all__ = ["Conditioner", "Outputs", "TextEncoders", "load_tokenizer", "token_limit", "tokenize", "tokens_of"]
