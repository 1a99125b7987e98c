"""Options of `build-engine`, before anything is built."""

from __future__ import annotations

import click
import pytest

from quest_deploy.commands.build_engine import parse_profile
from quest_deploy.config import ProfileConfig, ShapeRange


def test_a_profile_has_ranges_or_single_sizes() -> None:
    assert parse_profile("batch=1:2:4,height=768,sequence=77:77:154") == ProfileConfig(
        batch=ShapeRange(min=1, opt=2, max=4),
        height=ShapeRange(min=768, opt=768, max=768),
        sequence=ShapeRange(min=77, opt=77, max=154),
    )


@pytest.mark.parametrize(
    "text", ["", "batch", "batch=1:2", "depth=3", "batch=a", "batch=1,batch=2", "batch=-1"]
)
def test_a_profile_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(
        click.UsageError, match="expected each of batch, height, width, sequence at most once"
    ):
        parse_profile(text)
