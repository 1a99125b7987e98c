"""Write the default prompt lists from the emoji names that the reference model was trained on.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz package/emoji.json
    python scripts/make_prompts.py package/emoji.json

The lists are package data (`quest_deploy/data/prompts/`); this script is here so that anybody can make them again. No
emoji, and no near-synonym of one, is in both lists: a held-out score must not measure a calibration prompt.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEED = 20240206

# Prompts by the data set's own category: (calibration, held-out besides the fixed ones). Flags and symbols get less
# than their share: they are many and alike.
QUOTAS = {
    "Smileys & Emotion": (38, 7),
    "People & Body": (42, 8),
    "Animals & Nature": (38, 8),
    "Food & Drink": (34, 6),
    "Travel & Places": (34, 6),
    "Activities": (18, 3),
    "Objects": (30, 6),
    "Symbols": (8, 1),
    "Flags": (14, 3),
}
SKIN_TONE_SHARE = 0.4  # of the people: training weighted captions with a skin tone 0.35
SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}
# Pictures of letters and signs: a 64-pixel model draws none of them legibly.
UNDRAWABLE = {
    "keycap",
    "alphanum",
    "arrow",
    "av-symbol",
    "punctuation",
    "currency",
    "math",
    "geometric",
    "time",
}
WORDS_WITHOUT_MEANING = frozenset(
    [
        "a",
        "an",
        "and",
        "face",
        "for",
        "in",
        "man",
        "men",
        "of",
        "on",
        "or",
        "people",
        "person",
        "sign",
        "skin",
        "symbol",
    ]
    + ["the", "tone", "with", "woman", "women"]
)
FILLER = frozenset({"of", "slice", "sign", "symbol"})
# Training prompts that are neither the Unicode nor the short name: the emoji they draw.
ALIASES = {
    "red heart": "heart",
    "flag japan": "jp",
    "woman dancing": "dancer",
    "snowman": "snowman_without_snow",
}


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One entry of the data set, as a caption."""

    short_name: str
    caption: str
    category: str
    skin_tones: tuple[str, ...]


def words(text: str) -> str:
    """Lower case with every run of separators as one space."""
    return re.sub(r"[\s_\-’'“”&.,:()!]+", " ", text).strip().lower()


def caption_of(entry: dict) -> str:
    """Return the Unicode name, or the short name where that is the same less filler ("slice of pizza": "pizza")."""
    name, short = words(entry["name"]), words(entry["short_name"])
    if entry["category"] == "Flags" and name.endswith(" flag"):
        return f"flag {name.removesuffix(' flag')}"
    return short if set(name.split()) - set(short.split()) <= FILLER else name


def read_emoji(path: Path) -> list[Emoji]:
    """Return every entry of `emoji.json` that has a picture to draw and a caption in plain words."""
    emoji = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        drawable = entry["has_img_google"] and entry["subcategory"] not in UNDRAWABLE
        if not drawable or entry["category"] not in QUOTAS or not entry["name"]:
            continue
        caption = caption_of(entry)
        if not re.fullmatch(r"[a-z]{3,}( [a-z]+){0,4}", caption):
            continue
        tones = tuple(SKIN_TONES[key] for key in entry.get("skin_variations", {}) if key in SKIN_TONES)
        emoji.append(
            Emoji(
                short_name=entry["short_name"],
                caption=caption,
                category=entry["category"],
                skin_tones=tones,
            )
        )
    return sorted(emoji, key=lambda item: item.short_name)


def meaning(caption: str) -> frozenset[str]:
    """Return the words that say what to draw, so that "woman dancing" and "man dancing" count as one."""
    content = frozenset(
        word.removesuffix("s") for word in caption.split() if word not in WORDS_WITHOUT_MEANING
    )
    return content or frozenset(caption.split())


def is_near(caption: str, others: Iterable[str]) -> bool:
    """Whether a caption shares at least half of its meaning with one of `others`."""
    own = meaning(caption)
    return any(2 * len(own & meaning(other)) >= len(own | meaning(other)) for other in others)


def choose(emoji: list[Emoji], fixed: list[str]) -> tuple[list[str], list[str]]:
    """Return (calibration, held-out) prompts; `fixed` are the first of the held-out ones."""
    generator = random.Random(SEED)
    taken = {ALIASES.get(prompt) for prompt in fixed}
    heldout, calibration = list(fixed), []
    for category, (calibration_quota, heldout_quota) in QUOTAS.items():
        pool = [item for item in emoji if item.category == category and item.short_name not in taken]
        generator.shuffle(pool)
        chosen: list[str] = []
        for item in pool:
            if len(chosen) == calibration_quota + heldout_quota:
                break
            if is_near(item.caption, [*chosen, *heldout, *calibration]):
                continue
            tone = item.skin_tones and generator.random() < SKIN_TONE_SHARE
            chosen.append(f"{item.caption} {generator.choice(item.skin_tones)}" if tone else item.caption)
        heldout += chosen[:heldout_quota]
        calibration += chosen[heldout_quota:]
    generator.shuffle(calibration)  # so that any prefix of the list spreads over the categories
    return calibration, heldout


def main() -> None:
    """Write both lists next to the package's code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("emoji_json", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "quest_deploy" / "data" / "prompts")
    arguments = parser.parse_args()

    training = json.loads((ROOT / "reference-model" / "training.json").read_text(encoding="utf-8"))
    calibration, heldout = choose(read_emoji(arguments.emoji_json), training["prompts"])
    notes = {
        "calibration": "Prompts that finetuning calibrates and trains on.",
        "heldout": "Prompts that no finetuning sees; the first 16 are those of reference-model/samples.png.",
    }
    source = "# Names of emoji-datasource-google 16.0.0 (MIT); made by scripts/make_prompts.py.\n"
    for name, prompts in (("calibration", calibration), ("heldout", heldout)):
        text = f"# {notes[name]}\n{source}" + "".join(f"{prompt}\n" for prompt in prompts)
        (arguments.output / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
