"""Does a tokenizer fit a set of pictures? A verdict from its figures there and on pictures that it is known to fit.

The thresholds come from small tokenizers, of digits and of photographs, on each other's pictures and on changed ones
(inverted, coloured, turned, dim, small, noisy, mixed), and from what 100 steps of training there gave. From the
tokenizer's weights, not from fresh ones, PSNR became 2.0 to 6.7 dB higher where SSIM had kept 31 % or more of its value
on the known pictures (turned, dim, small, inverted, noisy), 0.2 and 0.5 dB where it had kept 12 and 14 % (coloured
digits, photographs): so SSIM says whether the old weights are a start. On noisy pictures (PSNR 2.5 dB lower, SSIM
83 %) that training gained 0.3 dB: nothing need be done. How the codes are used says little: a tokenizer of digits
draws digits of whatever it is shown, with as many codes.
"""

from typing import NamedTuple

WORDS = ("use", "fine-tune", "train anew")
# All numbers of the rule.
WORSE_PSNR = 3.0  # dB below the known pictures' (twice their squared error): more, and it is to be fine-tuned
SSIM_USE, SSIM_TUNE = 0.8, 0.2  # shares of the known pictures': less, and it is to be fine-tuned, trained anew
LPIPS_USE, LPIPS_TUNE = 0.05, 0.25  # above the known pictures'; by analogy: no weights of it were at hand to measure
FEWEST_CODES = 0.25  # share of the codes used on the known pictures: less, and it is to be fine-tuned

RULE = (
    f"{WORDS[2]} where SSIM is below {SSIM_TUNE:.0%} of that on the known pictures, or LPIPS more than {LPIPS_TUNE:g} "
    f"above; else {WORDS[1]} where PSNR is more than {WORSE_PSNR:g} dB lower than there, or lower than that of one "
    f"flat colour for each picture, SSIM below {SSIM_USE:.0%}, LPIPS more than {LPIPS_USE:g} above, or fewer codes in "
    f"use than {FEWEST_CODES:.0%} of those there; else {WORDS[0]}"
)


class Verdict(NamedTuple):
    """word: one of WORDS; reasons: a line for each thing that was looked at, with what it says by itself."""

    word: str
    reasons: list[str]

    def __str__(self) -> str:
        return "\n".join([*(f"  {reason}" for reason in self.reasons), f"rule: {RULE}", f"verdict: {self.word}"])


def judge(own: dict, known: dict) -> Verdict:
    """Whether a tokenizer fits the pictures `own`, given that it fits `known`: the worst answer of all counts.

    Both hold the figures of `reconstruction.Sums`. SSIM and LPIPS are looked at where both have them; a figure that is
    not finite counts as the worst.
    """
    lower = known["psnr"] - own["psnr"]
    found = [
        (_level(lower <= WORSE_PSNR), f"PSNR {own['psnr']:.1f} dB, known pictures {known['psnr']:.1f} dB"),
        (
            _level(own["psnr"] > own["psnr_flat"]),
            f"PSNR {own['psnr']:.1f} dB, one flat colour for each picture would have {own['psnr_flat']:.1f} dB",
        ),
    ]
    if "ssim" in own and "ssim" in known:
        use, tune = (own["ssim"] >= share * known["ssim"] for share in (SSIM_USE, SSIM_TUNE))
        found.append((_level(use, tune), f"SSIM {own['ssim']:.3f}, known pictures {known['ssim']:.3f}"))
    if "lpips" in own and "lpips" in known:
        use, tune = (own["lpips"] - known["lpips"] <= above for above in (LPIPS_USE, LPIPS_TUNE))
        found.append((_level(use, tune), f"LPIPS {own['lpips']:.3f}, known pictures {known['lpips']:.3f}"))
    few = own["codes_used"] < FEWEST_CODES * known["codes_used"]
    found.append((_level(not few), f"codes used {own['codes_used']:.1%}, known pictures {known['codes_used']:.1%}"))
    reasons = [f"{said}: {WORDS[level]}" for level, said in found]
    if not known["psnr"] > known["psnr_flat"]:
        reasons.append(
            f"it does not fit the known pictures either (PSNR {known['psnr']:.1f} dB, flat ones "
            f"{known['psnr_flat']:.1f} dB), so this says little: name others with --against"
        )
    return Verdict(WORDS[max(level for level, _ in found)], reasons)


def _level(use: bool, tune: bool = True) -> int:
    return 0 if use else 1 if tune else 2
