"""mage-ds bench samplers: operations against a hand calculation, and what it makes and reads of a tiny export."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mage_ds import cli, models
from mage_ds.engine import stored
from mage_ds.evaluation import readable
from mage_ds.interop import exported, official
from mage_ds.interop.parts import Parts
from mage_ds.sampling import decode
from mage_ds.tasks.bench_samplers import _Choice, operations

N, CODES, WIDTH, INSIDE, DEPTH, BELOW = 16, 32, 32, 24, 2, 1
SAMPLING = {"steps": 3, "temperature": 2.0, "guidance": 0.5, "token_temperature": 0.9}
VQGAN = {"channels": 8, "multipliers": [1, 1, 1], "blocks": 1, "code_dim": 4, "codes": CODES}


def make_mage(classes):
    return {
        "encoder": {"depth": DEPTH, "width": WIDTH, "heads": 2},
        "decoder": {"depth": BELOW, "width": INSIDE, "heads": 2},
        "tokens": N,
        "codes": CODES,
        "vocabulary": CODES + 2,
        "dropout": 0.1,
        "padding": "cls",
        "classes": classes,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """export/ of random values with two labels, and data/ of bright bars, upright or lying."""
    root = tmp_path_factory.mktemp("samplers")
    parts = {}
    for kind, model, numbers in (("mage", models.Mage, make_mage(2)), ("tokenizer", models.Vqgan, VQGAN)):
        built = model(**numbers)
        for i, parameter in enumerate(built.parameters()):
            with torch.no_grad():
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
        more = {"sampling": SAMPLING, "facts": {"classes": ["lying", "upright"]}} if kind == "mage" else {}
        parts[kind] = Parts(kind, numbers, built.state_dict(), 16, origin="", tokenizer=parts.get("tokenizer"), **more)
    (root / "export").mkdir()
    whole = Parts(**vars(parts["mage"]) | {"tokenizer": parts["tokenizer"]})
    exported.write(root / "export", whole)
    shutil.copytree(root / "export", root / "bare")
    shutil.rmtree(root / "bare" / "tokenizer")
    config = root / "bare" / "config.json"  # without one, tokens count as 16 px
    config.write_text(config.read_text().replace('"image_size": 16', '"image_size": 64'))
    weights = models.Mage(**make_mage(None)).state_dict()
    official.write(root / "theirs.pth", Parts("mage", make_mage(None), weights, 64, origin=""), lambda _: None)
    rng = np.random.default_rng(0)
    for i in range(40):
        picture = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        at = slice(start := rng.integers(4, 9), start + 3)
        picture[(slice(None), at) if i % 2 else at] += 180
        path = root / "data" / "train" / ("upright" if i % 2 else "lying") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return root


def table(text: str) -> list[dict[str, str]]:
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(head, row, strict=True)) for row in rows]


def by_hand(kept: int, classes: bool, guided: bool) -> int:
    """Operations of one forward pass; of a block of width w on L tokens: 24 L w^2 + 4 L^2 w."""

    def block(length: int, width: int) -> int:
        return 24 * length * width**2 + 4 * length**2 * width

    decoder = 2 * (1 + kept) * WIDTH * INSIDE + BELOW * block(1 + N + classes, INSIDE)
    decoder += 2 * N * INSIDE * WIDTH + 2 * N * WIDTH * CODES
    return DEPTH * block(1 + kept, WIDTH) + (2 if guided else 1) * decoder


@pytest.mark.parametrize("classes", [None, 2])
@pytest.mark.parametrize("drop, kept", [(0.0, [16] * 4), (0.5, [8, 8, 8, 16])])  # 16, 14, 11, 6 are masked
def test_operations_equal_a_hand_calculation(classes, drop, kept):
    model = models.Mage(**make_mage(classes)).eval()
    before = [p.data_ptr() for p in model.parameters()]
    found = operations(model, SAMPLING, _Choice("halton", 4, drop))
    assert found == sum(by_hand(number, classes is not None, classes is not None) for number in kept)
    assert [p.data_ptr() for p in model.parameters()] == before and model.norm.weight.device.type == "cpu"


def test_a_row_for_each_choice(place, capsys):
    line = ["bench", "samplers", place / "export", "--num", 6, "--batch", 4, "--steps", "2,3", "--drop", "0,0.5"]
    assert cli.main([str(word) for word in [*line, "--reference", place / "data"]]) == 0
    said = capsys.readouterr().out
    rows = table(said)
    choices = [(row["order"], int(row["T"]), float(row["drop"])) for row in rows]
    own = ("confidence", 3, 0.0)
    assert choices[0] == choices[-1] == own and choices.count(own) == 2
    assert len(set(choices)) == 8 and len(choices) == 9  # two orders, two T, two drops
    peak = float(re.search(r"peak ([\d.]+) TFLOP/s", said)[1]) * 1e12
    for row, (_, steps, drop) in zip(rows, choices, strict=True):
        seconds, gflop = float(row["CPU s"]), float(row["GFLOP"])
        assert 0 < seconds <= float(row["s a picture"]) * 1.01
        assert float(row["ratio"]) == pytest.approx(seconds / float(rows[0]["CPU s"]), rel=0.001, abs=0.006)
        assert float(row["mfu"][:-1]) / 100 == pytest.approx(gflop * 1e9 / seconds / peak, rel=0.02, abs=6e-4)
        fewest = [N, *(int(N * np.cos(np.pi / 2 * t / steps)) for t in range(1, steps))]
        kept = [N // 2 if drop and left >= N // 2 else N for left in fewest]
        drawing = gflop - sum(by_hand(number, True, True) for number in kept) / 1e9
        assert drawing == pytest.approx(float(re.search(r"part: ([\d.]+) GFLOP", said)[1]), rel=0.01)
    opened = stored.open_model(place / "export")
    pictures = [np.asarray(Image.open(path)) for path in sorted((place / "data").rglob("*.png"))]
    judge = readable.fit(pictures, [int(path.parent.name == "upright") for path in sorted(place.rglob("*.png"))])
    for row, (order, steps, drop) in zip(rows, choices, strict=True):
        tokens = decode.decode(
            opened.mage,
            torch.zeros(6, N, dtype=torch.int64),
            torch.ones(6, N, dtype=torch.bool),
            noise=decode.keyed_noise(0, np.arange(6), N),
            labels=torch.arange(6) % 2,
            **opened.sampling | {"order": order, "steps": steps, "drop": drop},
        )
        with torch.no_grad():
            found = readable.readable(judge, decode.pixels(opened.tokenizer.detokenize(tokens)))
        shares = np.bincount(found.label, minlength=2) / 6
        assert row["readable"] == f"{found.readable.mean():.1%}"
        assert row["rarest class"] == f"{shares.min():.1%} ({['lying', 'upright'][shares.argmin()]})"
        assert row["as asked"] == f"{(found.label == np.arange(6) % 2).mean():.1%}"
    assert "the last row is the first again" in said and "spread" in said


def test_a_file_without_tokenizer_and_the_same_twice(place, capsys):
    line = ["bench", "samplers", place / "theirs.pth", "--tokenizer", place / "export" / "tokenizer", "--num", 2]
    line += ["--steps", "2,2,1", "--orders", "confidence,confidence", "--drop", "0,0"]
    assert cli.main(list(map(str, line))) == 0
    assert [int(row["T"]) for row in table(capsys.readouterr().out)] == [20, 2, 1, 20]  # the authors' own T


@pytest.mark.full
def test_the_compiled_step_draws_the_same_tokens(place, capsys):
    line = ["bench", "samplers", str(place / "export"), "--num", "8", "--steps", "4", "--drop", "0,0.5", "--compile"]
    assert cli.main(line) == 0
    for row in table(capsys.readouterr().out):
        assert float(row["same tokens"][:-1]) > 95  # rounding may turn a choice
        assert float(row["to eager"]) == pytest.approx(float(row["its CPU s"]) / float(row["CPU s"]), abs=0.006)


@pytest.mark.parametrize(
    "words, said",
    [
        (["data"], "data: is no run folder and no export"),
        (["export/tokenizer"], "export/tokenizer: is a tokenizer, which makes no pictures"),
        (["bare"], "bare: comes without a tokenizer; give the one that it was trained with: --tokenizer PATH"),
        (["export", "--checkpoint", "3"], "--checkpoint 3: export is no run folder"),
        (["export", "--reference", "data/train/lying"], "--reference data/train/lying: has no labels; `readable`"),
        (["export", "--orders", "random"], "random: must be one of confidence, halton"),
        (["export", "--steps", "4,0"], "0: must be a whole number at least 1"),
        (["export", "--drop", "1"], "1: must be a finite number from 0 to 0.99"),
    ],
)
def test_mistakes_are_one_line(place, words, said, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert cli.main(["bench", "samplers", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
