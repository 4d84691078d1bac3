"""The verdict on a tokenizer: what was measured with small ones, each line of the rule by itself, and its edges."""

import math

import pytest

from mage_ds.evaluation import fitness

KNOWN = {"psnr": 20.0, "psnr_flat": 12.0, "ssim": 0.6, "lpips": 0.2, "codes_used": 0.8}


def word(known=KNOWN, **own):
    return fitness.judge(KNOWN | own, known).word


# PSNR, that of flat pictures, SSIM, share of codes: a tokenizer of digits at 32 pixels.
DIGITS = {"digits": (20.4, 9.2, 0.836, 0.57), "dim": (11.1, 17.2, 0.461, 0.59), "turned": (9.4, 9.2, 0.387, 0.59)}
DIGITS |= {"noisy": (17.9, 9.4, 0.693, 0.59), "mixed": (17.3, 11.9, 0.653, 0.63), "inverted": (4.6, 9.2, 0.259, 0.59)}
DIGITS |= {"photographs": (8.4, 19.4, 0.117, 0.60), "coloured": (7.1, 18.3, 0.100, 0.65)}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("digits", "use"),
        ("noisy", "use"),
        ("mixed", "fine-tune"),
        ("dim", "fine-tune"),
        ("inverted", "fine-tune"),
        ("turned", "fine-tune"),
        ("photographs", "train anew"),
        ("coloured", "train anew"),
    ],
)
def test_what_was_measured_with_a_tokenizer_of_digits(name, expected):
    own, known = (
        dict(zip(("psnr", "psnr_flat", "ssim", "codes_used"), DIGITS[each], strict=True)) for each in (name, "digits")
    )
    assert fitness.judge(own, known).word == expected


@pytest.mark.parametrize(
    "own, expected",
    [
        ({}, "use"),
        ({"psnr": 25.0, "ssim": 0.9, "lpips": 0.1, "codes_used": 1.0}, "use"),
        ({"psnr": 17.0}, "use"),
        ({"psnr": 16.9}, "fine-tune"),
        ({"psnr_flat": 21.0}, "fine-tune"),
        ({"ssim": 0.481}, "use"),
        ({"ssim": 0.47}, "fine-tune"),
        ({"ssim": 0.121}, "fine-tune"),
        ({"ssim": 0.11}, "train anew"),
        ({"lpips": 0.24}, "use"),
        ({"lpips": 0.3}, "fine-tune"),
        ({"lpips": 0.46}, "train anew"),
        ({"codes_used": 0.19}, "fine-tune"),
        ({"psnr": 10.0, "ssim": 0.1}, "train anew"),
        ({"psnr": math.nan}, "fine-tune"),
        ({"ssim": math.nan}, "train anew"),
    ],
)
def test_each_line_of_the_rule(own, expected):
    assert word(**own) == expected


def test_reasons_say_what_each_figure_says():
    verdict = fitness.judge(KNOWN | {"ssim": 0.3}, KNOWN)
    assert "SSIM 0.300, known pictures 0.600: fine-tune" in verdict.reasons
    assert sum(reason.endswith(": use") for reason in verdict.reasons) == len(verdict.reasons) - 1
    text = str(verdict).splitlines()
    assert text[-1] == "verdict: fine-tune" and text[-2] == f"rule: {fitness.RULE}"


def test_known_pictures_that_it_does_not_fit_are_said():
    verdict = fitness.judge(KNOWN, KNOWN | {"psnr_flat": 21.0, "ssim": -0.1})
    assert verdict.word == "use" and "does not fit the known pictures either" in verdict.reasons[-1]


def test_figures_that_are_missing_are_not_looked_at():
    bare = {key: value for key, value in KNOWN.items() if key not in ("ssim", "lpips")}
    assert fitness.judge(bare, KNOWN).word == fitness.judge(KNOWN, bare).word == "use"
    assert len(fitness.judge(bare, KNOWN).reasons) == 3
