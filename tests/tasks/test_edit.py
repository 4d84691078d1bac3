"""`mage-ds edit` as a user calls it, in one process: every kind of picture and mask, the folder, and mistakes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_export import FACTOR, SIDE, make_export
from PIL import Image, features

import mage_ds
from mage_ds import cli
from mage_ds.report import grids
from mage_ds.sampling import decode, regions


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("made") / "export")


@pytest.fixture(scope="module")
def model(export):
    return mage_ds.from_pretrained(export, device="cpu")


@pytest.fixture
def go(export, tmp_path, monkeypatch, capsys):
    """go(words) in a folder of its own: (exit code, stdout, stderr). RUN and --out are put in."""
    monkeypatch.chdir(tmp_path)

    def call(*words, run=export, out="out"):
        code = cli.main(["edit", str(run), *map(str, words), "--out", out])
        return code, *capsys.readouterr()

    return call


def pixels(high, wide, seed=0):
    """Smooth colours with a little noise, uint8 (high, wide, 3)."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((wide, high), Image.BICUBIC)
    return np.clip(np.asarray(rough) + rng.integers(-9, 10, (high, wide, 3)), 0, 255).astype(np.uint8)


def save(array, name, **more):
    Image.fromarray(np.asarray(array)).save(name, **more)
    return name


def load(name):
    with Image.open(name) as image:
        return np.asarray(image.convert("RGB"))


def seen(name):
    """The picture as the model took it: the first of the panel."""
    enlarged = grids.enlarge(np.zeros((1, SIDE, SIDE, 3), np.uint8)).shape[1] // SIDE
    return load(f"out/{name}.panel.png")[2::enlarged, 2::enlarged][:SIDE, :SIDE]


def test_results_are_those_of_the_python_api(go, model):
    images = [pixels(SIDE, SIDE, i) for i in range(3)]
    names = [save(image, f"p{i}.png") for i, image in enumerate(images)]
    words = ["inpaint:3,5,9,14", "outpaint:0.5", "uncrop"]
    code, said, wrong = go(*names, *(f"--region={word}" for word in words), "--variants", 2, "--seed", 3, "--batch", 4)
    assert (code, wrong) == (0, "") and "p0.png: 32 x 32 px, inpaint:3,5,9,14: 12 of 64 tokens hidden" in said
    masks = np.stack([regions.region(word, SIDE, SIDE) for word in words])
    first = decode.pixels(model.edit(np.stack(images), masks, seed=3, batch=4))
    tokens = model.tokenize(np.stack(images))
    for i in range(3):
        assert (load(f"out/p{i}_1.png") == first[i]).all()
        assert (load(f"out/p{i}_2.png") != first[i]).any()  # variants differ
        panel = load(f"out/p{i}.panel.png")
        hidden = regions.token_mask(masks[i], FACTOR)
        for j, shown in enumerate((images[i], grids.mask_overlay(images[i], hidden), first[i])):
            assert (panel[2:66, 2 + 66 * j : 66 + 66 * j] == shown.repeat(2, 0).repeat(2, 1)).all()
    facts = json.loads(Path("out/edits.json").read_text())
    assert facts["complete"] and facts["seed"] == 3 and facts["sampling"]["steps"] == 4
    assert [each["hidden_tokens"] for each in facts["pictures"]] == [12, 48, 60]
    for name, digest in facts["files"].items():
        assert hashlib.sha256(Path("out", name).read_bytes()).hexdigest() == digest
    assert len(facts["files"]) == 6 and len(tokens) == 3


def test_composited_pictures_keep_what_is_known_byte_for_byte(go, model):
    photo = pixels(50, 70)
    mask = np.zeros((50, 70), np.uint8)
    mask[20:30, 25:40] = 255
    go(
        save(photo, "a.png"),
        "--region",
        save(mask, "m.png"),
        "--variants=1",
        "--composite",
        "--feather=2",
        "--show-mask",
    )
    original, result = seen("a"), load("out/a_1.png")
    ours = Image.fromarray(photo[:, 10:60]).resize((SIDE, SIDE), Image.BICUBIC)
    assert (original == np.asarray(ours)).all()
    hidden = np.zeros((SIDE, SIDE), bool)  # any pixel that a smaller one is made of; centres in 50 px / 32
    for y, x in zip(*np.nonzero(mask[:, 10:60]), strict=True):
        hidden[int((y + 0.5) * SIDE / 50), int((x + 0.5) * SIDE / 50)] = True
    assert (result[~hidden] == original[~hidden]).all() and (result[hidden] != original[hidden]).mean() > 0.5
    shown = load("out/a.mask.png")[2:258, 2:258]
    tokens = regions.token_mask(hidden, FACTOR).repeat(FACTOR, 0).repeat(FACTOR, 1)
    for y in range(SIDE):
        for x in range(SIDE):
            middle = shown[8 * y + 4, 8 * x + 4].astype(int)
            tint = (230, 30, 30) if hidden[y, x] else (255, 165, 0)
            expected = 0.4 * original[y, x] + 0.6 * np.array(tint) if tokens[y, x] else original[y, x]
            assert np.abs(middle - expected).max() <= 1


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def test_pictures_of_all_kinds(go):
    square = pixels(SIDE, SIDE)
    grey = square[..., 0]
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:8] = 0
    clear = np.dstack([square, alpha])
    white = np.where(alpha[..., None] > 0, square, 255)
    palette = Image.fromarray(square).quantize(16)
    palette.save("palette.png")
    turned = {"turned.png": np.rot90(square)}  # orientation 6: shown turned by a quarter to the right
    save(turned["turned.png"], "turned.png", exif=exif(6))
    expected = {
        save(grey, "grey.png"): np.dstack([grey] * 3),
        save(clear, "clear.png"): white,
        save(square.repeat(300, 1), "wide.png"): square[:, 0:0],  # shape only
        save(pixels(1, 4000), "thread.png"): None,
        save(pixels(1, 1), "tiny.png"): None,
        save(pixels(300, 200), "photo.jpg"): None,
        "palette.png": np.asarray(palette.convert("RGB")),
        "turned.png": square,
    }
    code, said, wrong = go(*expected, "--region", "inpaint", "--variants", 1)
    assert (code, wrong) == (0, "") and "thread.png: 4000 x 1 px" in said and "turned.png: 32 x 32 px" in said
    for name, picture in expected.items():
        stem = name.split(".")[0]
        assert load(f"out/{stem}_1.png").shape == (SIDE, SIDE, 3)
        if picture is not None and picture.size:
            assert (seen(stem) == picture).all(), name
    assert (seen("tiny") == load("tiny.png")[0, 0]).all()
    assert (seen("wide") == square.repeat(300, 1)[:, 4784:4816]).all()


def hidden(name):
    return next(e for e in json.loads(Path("out/edits.json").read_text())["pictures"] if e["name"] == name)[
        "hidden_tokens"
    ]


def test_masks_of_all_kinds(go):
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:4, :8] = 0
    alpha[4, 0] = 254  # the soft edge of an eraser
    black = np.zeros((SIDE, SIDE), np.uint8)
    faint = black.copy()
    faint[31, 31] = 1
    save(np.dstack([pixels(SIDE, SIDE), alpha]), "own.png")
    save(pixels(64, 48), "b.png")
    large = np.zeros((64, 48), np.uint8)
    large[8, 0:48] = 255  # row 8 - 8 = 0 of the centre square, one pixel of 48
    turned = np.zeros((48, 64), np.uint8)
    turned[:, 63 - 8] = 255  # the same, as a camera held sideways would write it: orientation 8 turns it back
    masks = {
        "alpha": ("own.png", 3),
        save(np.dstack([black, alpha]), "la.png"): ("b.png", 3),
        save(np.dstack([pixels(SIDE, SIDE), alpha]), "rgba.png"): ("b.png", 3),
        save(np.dstack([*[faint] * 3, np.full_like(alpha, 255)]), "opaque.png"): ("b.png", 1),
        save(faint, "faint.png"): ("b.png", 1),
        save(faint > 0, "bits.png"): ("b.png", 1),
        save(faint.astype(np.uint16) * 300, "deep.png"): ("b.png", 1),
        save(large, "large.png"): ("b.png", 8),
        save(turned, "turned.png", exif=exif(6)): ("b.png", 8),
    }
    Image.fromarray(faint).convert("P").save("p.png")
    masks["p.png"] = ("b.png", 1)
    pictures = [picture for picture, _ in masks.values()]
    code, _, wrong = go(*pictures, *(f"--region={each}" for each in masks), "--variants", 1, "--steps", 1)
    assert (code, wrong) == (0, ""), wrong
    names = ["own", "b", *(f"b-{i}" for i in range(2, len(masks)))]
    assert [hidden(name) for name in names] == [count for _, count in masks.values()]


def test_a_folder_goes_on_and_refuses_other_settings(go):
    save(pixels(40, 40), "a.png")
    line = ["a.png", "--region", "outpaint", "--steps", "2"]
    assert go(*line, "--variants", 3)[0] == 0
    before = {name: Path("out", name).read_bytes() for name in ("a_1.png", "a_2.png", "a_3.png")}
    os.remove("out/a_2.png")
    code, said, _ = go(*line, "--variants", 4)
    assert code == 0 and "edited 2/2" in said
    assert all(Path("out", name).read_bytes() == before[name] for name in before)
    code, said, _ = go(*line)
    assert code == 0 and "edited" not in said
    for other, what in [
        (["a.png", "--region", "outpaint", "--steps", "3"], "sampling"),
        ([*line, "--seed", "1"], "seed 0 there, 1 here"),
        ([*line, "--composite"], "composite False there, True here"),
        (["a.png", "--region", "uncrop", "--steps", "2"], "a (outpaint,"),
        (["a.png", "a.png", *line[1:]], "pictures"),
    ]:
        code, _, wrong = go(*other)
        assert code == 2 and "holds edits of other settings" in wrong and what in wrong and wrong.count("\n") == 1
    save(pixels(41, 41), "a.png")
    assert go(*line)[0] == 2


def test_only_what_edit_made_is_taken_for_a_result(go):
    save(pixels(SIDE, SIDE), "a.png")
    line = ["a.png", "--region", "outpaint", "--steps", "2"]
    assert go(*line, "--variants", 2)[0] == 0
    whole, made = json.loads(Path("out/edits.json").read_text()), Path("out/a_2.png").read_bytes()
    assert set(whole["files"]) == {"a_1.png", "a_2.png"}
    strange = Path(save(pixels(SIDE, SIDE, 3), "out/a_3.png")).read_bytes()
    code, _, wrong = go(*line, "--variants", 3)  # a folder that grows
    assert code == 2 and "out/a_3.png: exists and was not made by `edit`" in wrong
    assert Path("out/a_3.png").read_bytes() == strange and json.loads(Path("out/edits.json").read_text()) == whole
    os.remove("out/a_3.png")
    for changed in (b"no picture", strange):
        Path("out/a_2.png").write_bytes(changed)
        code, _, wrong = go(*line)
        assert code == 2 and "out/a_2.png: was changed since `edit` made it; remove it" in wrong
    del whole["files"]["a_2.png"]  # as a kill leaves it, between a result and its checksum
    Path("out/edits.json").write_text(json.dumps(whole | {"complete": False}))
    code, said, _ = go(*line, "--variants", 2)
    assert code == 0 and "edited 1/1" in said and Path("out/a_2.png").read_bytes() == made
    assert json.loads(Path("out/edits.json").read_text())["complete"]


def test_what_was_made_before_a_kill_is_not_made_again(go, monkeypatch):
    save(pixels(SIDE, SIDE), "a.png")
    line, usual, calls = ["a.png", "--region", "outpaint", "--batch", 2], grids.save, []

    def killed(picture, path):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        usual(picture, path)

    monkeypatch.setattr(grids, "save", killed)
    assert go(*line)[0] == 130 and sorted(os.listdir("out")) == ["a_1.png", "a_2.png", "a_3.png", "edits.json"]
    assert set(json.loads(Path("out/edits.json").read_text())["files"]) == {"a_1.png", "a_2.png"}
    monkeypatch.setattr(grids, "save", usual)
    code, said, _ = go(*line)
    assert code == 0 and "edited 2/2" in said
    assert go(*line, out="whole")[0] == 0
    for name in (f"a_{v}.png" for v in range(1, 5)):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


def test_what_is_written_down_is_what_was_done(go, export, tmp_path):
    shutil.copytree(export, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"sampling": facts["sampling"] | {"drop": 0.5}}))
    save(pixels(SIDE, SIDE), "a.png")
    line = ["a.png", "--region", "inpaint", "--variants", 1, "--order", "halton", "--token-temperature", "0.5"]
    assert go(*line, run="run")[0] == 0
    said = json.loads(Path("out/edits.json").read_text())
    assert said["sampling"]["drop"] == 0 and said["precision"] == "float32"
    assert (said["sampling"]["order"], said["sampling"]["token_temperature"]) == ("halton", 0.5)
    os.rename("run", "moved")  # its name is in the origin
    code, said, wrong = go(*line, run="moved")
    assert (code, wrong) == (0, "") and "edited" not in said
    code, _, wrong = go(*line, "--precision", "bf16", run="moved")
    assert code == 2 and "precision float32 there, bf16 here" in wrong
    assert go(*line, "--precision", "bf16", run="moved", out="bf16")[0] == 0
    half = mage_ds.from_pretrained("moved", device="cpu", dtype="bfloat16")
    mask = regions.region("inpaint", SIDE, SIDE)
    made = half.edit(load("a.png"), mask, order="halton", token_temperature=0.5)
    assert (load("bf16/a_1.png") == decode.pixels(made)[0]).all()


def test_lossy_masks_are_refused(go, tmp_path):
    save(pixels(SIDE, SIDE), "a.png")
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    mask[12:20, 10:17] = 255
    soft = np.dstack([mask, 255 - mask[..., 0]])  # WebP with transparency has another layout
    exact = ["m.png", "m.bmp", "m.gif", "m.ppm"]
    exact = [save(mask, name) for name in exact] + [save(mask, "m.tif", compression="tiff_lzw")]
    exact += [save(mask, "m.webp", lossless=True), save(soft, "alpha.webp", lossless=True)]
    Image.fromarray(mask).save("film.webp", save_all=True, append_images=[Image.fromarray(255 - mask)], lossless=True)
    for name in [*exact, "film.webp"]:
        code, _, wrong = go("a.png", "--region", name, "--variants", 1, "--steps", 1, out=f"out of {name}")
        assert (code, wrong) == (0, "")
        facts = json.loads(Path(f"out of {name}", "edits.json").read_text())
        assert facts["pictures"][0]["hidden_tokens"] == 6, name
    lossy = [save(mask, "l.jpg"), save(mask, "l.webp"), save(soft, "al.webp"), save(mask, "l.jp2")]
    lossy += [save(mask, "l.tif", compression="jpeg")]
    Image.fromarray(mask).save("l-film.webp", save_all=True, append_images=[Image.fromarray(255 - mask)], quality=50)
    lossy += [save(mask, "l.avif")] if features.check("avif") else []
    for name in [*lossy, "l-film.webp"]:
        code, _, wrong = go("a.png", "--region", name)
        assert code == 2 and wrong.count("\n") == 1, name
        assert f"{name}: is a " in wrong and "save the mask as PNG, BMP, TIFF, GIF or lossless WebP" in wrong
    assert not os.path.exists("out")


def test_a_users_own_files_are_not_written_over(go):
    save(pixels(8, 8), "a_1.png")
    save(pixels(9, 9), "a.png")
    code, _, wrong = go("a.png", "--region", "inpaint", out=".")
    assert code == 2 and "a_1.png: exists and was not made by `edit`" in wrong
    assert load("a_1.png").shape == (8, 8, 3)


def test_names_that_clash_are_made_distinct(go):
    os.mkdir("other")
    for name in ("a.png", "other/a.png", "A.jpg", "a_1.png"):
        save(pixels(SIDE, SIDE), name)
    code, *_ = go("a.png", "other/a.png", "A.jpg", "a_1.png", "--region", "inpaint", "--variants", 1, "--steps", 1)
    made = sorted(name for name in os.listdir("out") if "panel" not in name)
    assert code == 0 and made == ["A-3_1.png", "a-2_1.png", "a_1.png", "a_1_1.png", "edits.json"]


def test_mistakes_are_one_line(go, export, tmp_path, model):
    save(pixels(40, 60), "a.png")
    save(np.zeros((40, 60), np.uint8), "black.png")
    save(np.zeros((40, 61), np.uint8), "other.png")
    save(np.zeros((40, 60), np.uint16), "deep.png")
    Path("text.png").write_text("no picture")
    whole = Path("a.png").read_bytes()
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    bare = make_export(tmp_path / "bare", tokenizer=False)
    tokenizer = export / "tokenizer"
    for words, more, said in [
        (["no.png", "--region", "inpaint"], {}, "no.png: no such picture"),
        (["text.png", "--region", "inpaint"], {}, "text.png: cannot be read as a picture"),
        (["cut.png", "--region", "inpaint"], {}, "cut.png: cannot be read as a picture"),
        ([".", "--region", "inpaint"], {}, "cannot be read as a picture"),
        (["deep.png", "--region", "inpaint"], {}, "deep.png: is of PIL's mode I;16"),
        (["a.png", "--region", "no.png"], {}, "no.png: no such mask"),
        (
            ["a.png", "--region", "other.png"],
            {},
            "is 61 x 40 px; a mask must be as large as its picture (a.png: 60 x 40)",
        ),
        (["a.png", "--region", "black.png"], {}, "black.png: hides nothing of the centre square of a.png"),
        (["a.png", "--region", "alpha"], {}, "a.png: has no transparent pixel"),
        (["a.png", "--region", "inpaint:0,0,33,4"], {}, "reaches out of the picture, which has 32 x 32"),
        (["a.png", "--region", "inpant"], {}, "did you mean inpaint?"),
        (["a.png", "a.png", "a.png", "--region", "uncrop", "--region", "inpaint"], {}, "--region: 2 given for 3"),
        (["a.png", "--region", "inpaint", "--feather", "3"], {}, "--composite"),
        (["a.png", "--region", "alpha", "--feather", "3", "--composite"], {}, "no original to blend into"),
        (["a.png", "--region", "inpaint", "--class-label", "1"], {}, "--class-label 1: this model was trained without"),
        (["a.png", "--region", "inpaint", "--guidance", "1"], {}, "--guidance 1.0: moves towards a label"),
        (["a.png", "--region", "inpaint"], {"run": bare}, "comes without a tokenizer"),
        (["a.png", "--region", "inpaint", "--tokenizer", tokenizer], {"run": bare}, "tokenizer: makes 1024 tokens"),
        (["a.png", "--region", "inpaint"], {"run": tokenizer}, "is a tokenizer; edit needs a pre-trained MAGE"),
        (["a.png", "--region", "inpaint"], {"run": "nowhere"}, "nowhere: no such run folder"),
        (["a.png"], {}, "--region"),
        (["a.png", "--region", "inpaint"], {"out": "a.png"}, "--out a.png: is a file"),
    ]:
        code, _, wrong = go(*words, **more)
        assert code == 2 and wrong.startswith("mage-ds: error: ") and wrong.count("\n") == 1, (words, wrong)
        assert said in wrong, (words, wrong)
    assert not os.path.exists("out")  # nothing was begun


def test_labels(go, tmp_path):
    run = make_export(tmp_path / "labelled", classes=3)
    save(pixels(SIDE, SIDE), "a.png")
    line = ["a.png", "a.png", "--region", "inpaint:0,0,32,32", "--variants", 1, "--batch", 2]
    assert go(*line, "--class-label", "0,2", run=run)[0] == 0
    assert go(*line, "--class-label", "0", run=run, out="zero")[0] == 0
    assert (load("out/a_1.png") == load("zero/a_1.png")).all()
    assert (load("out/a-2_1.png") != load("zero/a-2_1.png")).any()
    opened = mage_ds.from_pretrained(run, device="cpu")
    made = opened.generate(2, class_label=[0, 2], batch=2)
    assert torch.equal(
        made, opened.edit(np.stack([load("a.png")] * 2), np.ones((32, 32), bool), class_label=[0, 2], batch=2)
    )
    assert (load("out/a-2_1.png") == decode.pixels(made)[1]).all()
    assert "0..2" in go(*line, "--class-label", "3", run=run)[2]
    assert "--class-label: 3 given for 2" in go(*line, "--class-label", "0..2", run=run)[2]


def test_a_model_that_always_saw_a_label_needs_one(go, tmp_path):
    run = make_export(tmp_path / "never", classes=3, label_dropout=0)
    save(pixels(SIDE, SIDE), "a.png")
    line = ["a.png", "--region", "inpaint", "--variants", 1, "--steps", 1]
    never = f"{run} was trained with label_dropout = 0 and cannot do without a label"
    assert f"error: --class-label is missing: {never}; give one of 0..2\n" in go(*line, run=run)[2]
    wrong = go(*line, "--class-label", 1, "--guidance", 2, run=run)[2]
    assert f"error: --guidance 2: {never}, which guidance leads away from; give --guidance 0\n" in wrong
    assert not os.path.exists("out")
    assert go(*line, "--class-label", 1, run=run)[0] == 0
