"""prepare --sample emoji: what is drawn, in which classes, on which side of the split, and what is said without a font.

Skipped where Debian's font and list are not installed: bash launch/test.sh installs them, as root.
"""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.features
import PIL.ImageFont
import pytest
from PIL import Image

from mage_ds.errors import UserError
from mage_ds.inputs import emoji
from mage_ds.inputs.catalog import open_catalog
from mage_ds.tasks.prepare import prepare

GROUPS = {
    "activities": "Activities",
    "animals-nature": "Animals & Nature",
    "flags": "Flags",
    "food-drink": "Food & Drink",
    "objects": "Objects",
    "people-body": "People & Body",
    "smileys-emotion": "Smileys & Emotion",
    "symbols": "Symbols",
    "travel-places": "Travel & Places",
}
TONES = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}
missing = [str(path) for path in (emoji.FONT, emoji.LIST) if not path.is_file()]
installed = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "emoji"
    prepare(sample="emoji", out=out)
    return out


def files(root: Path) -> dict[str, Path]:
    """Class and name without its ending -> file, of train/ and val/ together."""
    found = sorted(root.glob("*/*/*.jpg"))
    named = {f"{path.parent.name}/{path.stem}": path for path in found}
    assert len(named) == len(found)
    return named


def qualified() -> Counter:
    """Unicode's list read in another way: emoji of each group."""
    counts = Counter()
    for part in emoji.LIST.read_text(encoding="utf-8").split("\n# group: ")[1:]:
        counts[part.partition("\n")[0]] = len(re.findall(r"^[^#\n]+; fully-qualified\b", part, re.MULTILINE))
    return +counts


@installed
def test_counts_and_classes(made):
    train, val = open_catalog(made, "train"), open_catalog(made, "val")
    assert train.classes == val.classes == sorted(GROUPS)
    counts, listed = Counter(name.split("/")[0] for name in files(made)), qualified()
    assert set(GROUPS.values()) == set(listed)
    assert 3500 < train.n + val.n <= sum(listed.values())
    assert all(0.95 * listed[group] <= counts[name] <= listed[group] for name, group in GROUPS.items())
    assert 0.15 < val.n / (train.n + val.n) < 0.25


@installed
def test_each_is_a_picture_of_its_own(made):
    seen = set()
    for path in files(made).values():
        image = Image.open(path)
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (136, 136))
        pixels = np.asarray(image)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() >= 230 and np.median(corners) >= 254, path  # white, but for a hair of some
        assert (pixels.min(axis=2) < 200).sum() > 100, path  # not blank
        seen.add(hashlib.sha256(pixels.tobytes()).digest())
    assert len(seen) == len(files(made))


@installed
def test_known_pictures(made):
    """Colours at places that everybody knows."""
    pixels = {
        name: np.asarray(Image.open(files(made)[name])).astype(int)
        for name in (
            "smileys-emotion/1f600",  # grinning face
            "flags/1f1e9-1f1ea",  # Germany
            "flags/1f1ee-1f1f9",  # Italy
            "people-body/1f44b-1f3fb",  # waving hand, light
            "people-body/1f44b-1f3ff",  # and dark
        )
    }
    face, germany, italy, light, dark = pixels.values()
    red, green, blue = face[40, 68]
    assert red > 200 and green > 150 and blue < 100  # a yellow forehead
    black, middle, gold = (germany[row, 68] for row in (35, 68, 100))
    assert max(black) < 80 and middle[0] > 180 and max(middle[1:]) < 80 and min(gold[:2]) > 180 and gold[2] < 80
    left, centre, right = (italy[68, column] for column in (20, 68, 115))
    assert left[1] > left[0] + 50 and min(centre) > 200 and right[0] > right[1] + 100
    assert light.sum() > dark.sum() + 100_000


@installed
def test_variants_are_on_one_side(made):
    """Skin tones of one emoji, and its man and woman, look alike: val/ holds none that train/ shows a twin of."""
    sides = {}
    for name, path in files(made).items():
        codes = [code for code in name.split("/")[1].split("-") if code not in TONES and code != "fe0f"]
        plain = re.sub("(-200d-264[02])|(?<!-)1f46[89]", lambda match: "" if match[1] else "1f9d1", "-".join(codes))
        sides.setdefault(plain, set()).add(path.parent.parent.name)
    assert len(sides) > 1500 and all(len(both) == 1 for both in sides.values())
    assert {"train", "val"} == set.union(*sides.values())


@installed
def test_again(made, tmp_path, capsys):
    before = {path: os.stat(path).st_mtime_ns for path in files(made).values()}
    prepare(sample="emoji", out=made)
    assert "already prepared" in capsys.readouterr().out
    assert before == {path: os.stat(path).st_mtime_ns for path in files(made).values()}


def shortened(monkeypatch, tmp_path, *lines: str) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text("\n".join(["# group: Flags", *lines, ""]), encoding="utf-8")
    monkeypatch.setattr(emoji, "LIST", path)


@installed
def test_deterministic_and_what_is_left_out(monkeypatch, tmp_path, capsys):
    shortened(
        monkeypatch,
        tmp_path,
        "1F1E9 1F1EA ; fully-qualified     # Germany",
        "1F1F3 1F1F4 ; fully-qualified     # Norway",
        "1F1E7 1F1FB ; fully-qualified     # Bouvet Island, with Norway's flag",
        "1F1E6 1F1E6 ; fully-qualified     # no country: a flag with a question mark",
        "1F3F4 E0067 E0062 E0061 E0061 E0061 E007F ; fully-qualified     # no region either",
        "1F600 200D 1F600 ; fully-qualified     # two faces side by side",
        "0378 ; fully-qualified     # not assigned",
        "263A ; unqualified         # another way to write one that is there",
    )
    for name in ("a", "b"):
        prepare(sample="emoji", out=tmp_path / name, val_fraction=0)
        assert "left out: 4 that the font lacks, 1 that look exactly like another" in capsys.readouterr().out
    assert sorted(files(tmp_path / "a")) == ["flags/1f1e9-1f1ea", "flags/1f1f3-1f1f4"]
    for name, path in files(tmp_path / "a").items():
        assert path.read_bytes() == files(tmp_path / "b")[name].read_bytes()


@installed
def test_the_picture_is_the_glyph_on_white():
    """Against the glyph's own colours and opacity, taken from Pillow's mask, put on white in float64."""
    font = PIL.ImageFont.truetype(str(emoji.FONT), 109)
    draw = emoji.pen()
    for text in ("\U0001f1e9\U0001f1ea", "\U0001f469\U0001f3fd\u200d\U0001f692", "\U0001f47b"):
        glyph, _ = font.getmask2(text, mode="RGBA")
        glyph = np.array(glyph, dtype=float).reshape(glyph.size[1], glyph.size[0], 4)
        opacity = glyph[..., 3:] / 255
        want = np.full((136, 136, 3), 255.0)
        want[4:132] = opacity * glyph[..., :3] + (1 - opacity) * 255
        assert np.abs(np.asarray(draw(text)) - want).max() <= 1


@installed
def test_nothing_in_the_font(monkeypatch, tmp_path):
    shortened(monkeypatch, tmp_path, "0378 ; fully-qualified     # not assigned")
    with pytest.raises(UserError, match=r"NotoColorEmoji\.ttf: none of 1 emoji is in it; reinstall"):
        prepare(sample="emoji", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refusal(tmp_path) -> str:
    with pytest.raises(UserError) as error:
        prepare(sample="emoji", out=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    return str(error.value)


PACKAGES = "apt-get install fonts-noto-color-emoji unicode-data"


def test_no_list(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji, "LIST", tmp_path / "nowhere.txt")
    assert PACKAGES in refusal(tmp_path) and "nowhere.txt" in refusal(tmp_path)
    shortened(monkeypatch, tmp_path, "nothing of use")
    assert "lists no emoji" in refusal(tmp_path)


@pytest.mark.skipif(not PIL.features.check("raqm"), reason="this Pillow has no raqm layout (libfribidi0)")
def test_no_font(monkeypatch, tmp_path):
    shortened(monkeypatch, tmp_path, "1F600 ; fully-qualified     # grinning face")
    monkeypatch.setattr(emoji, "FONT", tmp_path / "nowhere.ttf")
    assert PACKAGES in refusal(tmp_path) and "nowhere.ttf" in refusal(tmp_path)
    (tmp_path / "nowhere.ttf").write_text("not a font")
    assert PACKAGES in refusal(tmp_path)


def test_no_raqm(monkeypatch, tmp_path):
    shortened(monkeypatch, tmp_path, "1F600 ; fully-qualified     # grinning face")
    monkeypatch.setattr(PIL.features, "check", lambda name: False)
    assert "apt-get install libfribidi0" in refusal(tmp_path)
