"""From prompts to images: the same code for every backend, around one engine for each component."""

from quest_deploy.pipeline.load import load_pipeline
from quest_deploy.pipeline.stage import generate
from quest_deploy.pipeline.text_to_image import Pipeline

__all__ = ["Pipeline", "generate", "load_pipeline"]
