"""`mage-ds evaluate --metrics fid,...` as a user starts it: of a model, of its files, killed, on two ranks, replayed;
its figures against a plain computation, and what a user gets wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import numpy as np
import pytest
import scipy.linalg
import torch
from launched import environment, run, several
from made_export import SIDE, make_export
from PIL import Image

import mage_ds
from mage_ds.engine import scored as engine_scored

pytestmark = pytest.mark.processes
NUM, BATCH, CLASSES = 100, 8, 4


def draw(folder, count, seed, ending="png", side=SIDE):
    """Pictures of soft blobs on a coloured ground."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    y, x = np.mgrid[:side, :side] / side
    for i in range(count):
        at, width, colour = rng.uniform(0.2, 0.8, 2), rng.uniform(0.05, 0.2), rng.uniform(0, 255, (2, 3))
        blob = np.exp(-((y - at[0]) ** 2 + (x - at[1]) ** 2) / width**2)[..., None]
        picture = (blob * colour[0] + (1 - blob) * colour[1]).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i:03d}.{ending}")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The folder of all that the command line made, and its answers by name: (exit code, stdout, stderr)."""
    root = tmp_path_factory.mktemp("scored")
    make_export(root / "mage", classes=CLASSES)
    other = make_export(root / "other")  # as a run extracts: another extractor by its weights
    assert other
    for kind, split, count in (("a", "train", 40), ("b", "train", 30), ("a", "val", 12)):
        draw(root / "real" / split / kind, count, hash((kind, split)) % 2**31)
    draw(root / "jpeg", 24, 3, "jpg")
    shutil.copy(root / "jpeg" / "003.jpg", root / "jpeg" / "004.jpg")
    draw(root / "unlike", 5, 4)
    draw(root / "unlike" / "large", 5, 5, side=SIDE + 8)
    draw(root / "one", 1, 6)
    np.savez(root / "float.npz", arr_0=np.random.default_rng(0).random((12, SIDE, SIDE, 3), dtype=np.float32))
    (root / "jpeg" / "config.json").write_text("{}")  # somebody's
    (root / "stranger").mkdir()
    (root / "stranger" / "config.json").write_text('{"kind": 3}')
    (root / "lone.tar").write_bytes(b"")
    (root / "versus.json").write_text('{"looks": [], "names": {}}')
    np.savez(root / "foreign.npz", mu=np.zeros(64), sigma=np.eye(64))
    ours = ["--features", "run:mage", "--threads", 1]
    base = ["mage", "--reference", "real", *ours, "--batch", BATCH]
    lines = {
        "drawn": [*base, "--num", NUM, "--out", "drawn", "--keep", "kept", "--metrics", "fid,fid_infinity,kid,prc"],
        "sample": None,
        "anew": None,
        "again": [*base, "--num", NUM, "--out", "drawn", "--metrics", "prc,fid"],
        "replay": ["--replay", "drawn/results.json"],
        "other weights": ["--replay", "changed.json", "--out", "never"],
        "statistics": ["--make-reference", "real", *ours, "--size", SIDE, "--batch", BATCH, "--out", "stats.npz"],
        "files": ["kept", "--reference", "stats.npz", *ours, "--batch", BATCH, "--out", "files"],
        "default place": ["kept", "--reference", "real:val", *ours, "--num", 50, "--metrics", "fid"],
        "per class": [*base, "--per-class", 5, "--out", "balanced", "--metrics", "fid,prc", "--neighbours", "off"],
        "redrawn": [
            "mage",
            "--data",
            "real:train",
            "--reference",
            "real",
            *ours,
            "--metrics",
            "fid",
            "--out",
            "redrawn",
        ],
        "jpeg": ["jpeg", "--reference", "stats.npz", *ours, "--out", "j", "--num", 30],
        "large": ["unlike/large", "--reference", "stats.npz", *ours, "--out", "l", "--metrics", "fid"],
        "little": [*base, "--num", 20, "--metrics", "fid", "--neighbours", "off", "--out", "grown"],
        "another metric": [*base, "--num", 20, "--metrics", "kid", "--neighbours", "off", "--out", "grown"],
        "more": [*base, "--num", 29, "--metrics", "fid", "--neighbours", "off", "--out", "grown"],
        "of files": ["kept", *base[1:], "--num", 29, "--metrics", "fid", "--out", "as_many"],
        "IS": [*base, "--num", 20, "--out", "never", "--metrics", "fid,is"],
        "foreign": ["kept", "--reference", "foreign.npz", *ours, "--out", "never"],
        "extractor": ["kept", "--reference", "stats.npz", "--features", "run:other", "--out", "never"],
        "itself": ["real:val", "--reference", "real:val", *ours, "--out", "never"],
        "unlike": ["unlike", "--reference", "real", *ours, "--out", "unlike_out"],
        "float": ["float.npz", "--reference", "real", *ours, "--out", "never"],
        "one": ["one", "--reference", "real", *ours, "--out", "never"],
        "steps": ["kept", "--reference", "real", *ours, "--steps", 3, "--out", "never"],
        "twice": [*base, "--num", 9, "--per-class", 5, "--out", "never"],
        "no classes": ["other", "--reference", "real", *ours, "--per-class", 5, "--out", "never"],
        "readable": [*base, "--metrics", "readable,fid", "--out", "never"],
        "both": [*base, "--inception", "f", "--out", "never"],
        "neither": ["kept", "--reference", "real", "--metrics", "fid", "--out", "never"],
        "other settings": [*base, "--num", NUM, "--seed", 5, "--out", "drawn"],
        "file": ["--make-reference", "real", *ours, "--out", "stats"],
        "tar": ["lone.tar", "--reference", "real", *ours, "--out", "never"],
        "stranger": ["stranger", "--reference", "real", *ours, "--out", "never"],
        "nowhere": ["nowhere", "--reference", "real", *ours, "--out", "never"],
        "no reference": ["kept", "--reference", "nowhere", *ours, "--out", "never"],
        "out is a file": ["kept", "--reference", "real", *ours, "--out", "float.npz/out"],
        "binary": ["--replay", "foreign.npz", "--out", "never"],
        "comparison": ["--replay", "versus.json", "--out", "never"],
        "weights": [*base, "--weights", "raw", "--out", "never"],
    }
    words = {name: ["evaluate", *line] for name, line in lines.items() if line}
    for name, out in (("sample", "kept"), ("anew", "anew")):
        words[name] = ["sample", "mage", "--num", NUM, "--batch", BATCH, "--out", out]
    first = list(lines)[:5]
    answers = dict(zip(first, several(*(words[name] for name in first), cwd=root), strict=True))
    changed = results(root / "drawn")
    changed["source"]["weights"] = "0" * 64
    (root / "changed.json").write_text(json.dumps(changed))
    rest = list(lines)[5:]
    return root, answers | dict(zip(rest, several(*(words[name] for name in rest), cwd=root), strict=True))


def results(folder):
    return json.loads((folder / "results.json").read_text())


def values(found):
    return {name: figure["value"] for name, figure in found["figures"].items()}


def said(scored, name) -> str:
    code, out, err = scored[1][name]
    assert code == 0, err
    return out


def features(model, pictures):
    """pictures: uint8 (n, SIDE, SIDE, 3)."""
    assert pictures.shape[1:] == (SIDE, SIDE, 3)
    return model.features(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255).double().numpy()


def opened(paths):
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def plain_fid(made, real):
    """By a matrix square root."""
    a, b = np.cov(made.T), np.cov(real.T)
    cross = scipy.linalg.sqrtm(a @ b).real.trace()
    return np.square(made.mean(0) - real.mean(0)).sum() + a.trace() + b.trace() - 2 * cross


def test_figures_are_those_of_a_plain_computation(scored):
    """Features by the Python interface, from the kept files."""
    root, _ = scored
    said(scored, "drawn")
    model = mage_ds.from_pretrained(root / "mage")
    kept = sorted((root / "kept").glob("0*.png"))
    made, real = (features(model, opened(each)) for each in (kept, sorted((root / "real" / "train").glob("*/*.png"))))
    assert (len(made), len(real)) == (NUM, 70)
    fid = plain_fid(made, real)
    found = results(root / "drawn")
    figures = found["figures"]
    assert figures["fid"]["value"] == pytest.approx(fid, rel=1e-3)
    low, high = figures["fid"]["interval"]
    assert low < figures["fid"]["value"] < high and figures["fid"]["n"] == NUM
    assert {*figures} == {"fid", "fid_infinity", "kid", "precision", "recall"}  # "again" asked for some of them
    apart = np.sqrt(((made[:, None] - real[None]) ** 2).sum(2)).min(1)
    within = np.sqrt(((real[:, None] - real[None]) ** 2).sum(2)) + np.diag(np.full(70, np.inf))
    near = found["neighbours"]
    assert near["median"] == pytest.approx(np.median(within.min(1)), rel=1e-3) and (near["n"], near["asked"]) == (
        NUM,
        70,
    )
    assert near["share"] == pytest.approx((apart < np.median(within.min(1))).mean(), abs=2 / NUM)


def test_reconstructions(scored):
    root, _ = scored
    said(scored, "redrawn")
    model = mage_ds.from_pretrained(root / "mage")
    real = opened(sorted((root / "real" / "train").glob("*/*.png")))
    drawn = model.detokenize(model.tokenize(real)).clamp(0, 1).permute(0, 2, 3, 1)
    drawn = (255 * drawn).round().to(torch.uint8).numpy()
    found = results(root / "redrawn")
    assert found["figures"]["fid"]["value"] == pytest.approx(
        plain_fid(features(model, drawn), features(model, real)), rel=2e-3
    )
    assert found["source"]["kind"] == "reconstructions" and found["figures"]["fid"]["n"] == 70


def test_what_is_said_and_written(scored):
    root, _ = scored
    text = said(scored, "drawn")
    for part in ("FID", "FID at n = infinity", "KID", "recall", "results: drawn", "few", "interval", "subsets of 70"):
        assert part in text, part
    found = results(root / "drawn")
    source, reference = found["source"], found["reference"]
    assert (source["kind"], source["n"], source["seed"], source["steps"], source["batch"]) == ("mage", NUM, 0, 4, BATCH)
    assert len(source["weights"]) == len(source["tokenizer"]) == len(found["extractor"]["hash"]) == 64
    assert (reference["n"], reference["split"], reference["resized"]) == (70, "train", SIDE)
    assert found["machine"] == {"device": "cpu", "threads": 1, "ranks": 1} and found["versions"]["torch"]
    sheet = np.asarray(Image.open(root / "drawn" / "sheet.png"))
    assert sheet.shape[0] > 10 * 64 and sheet.std() > 10


def test_kept_pictures_are_those_of_sample(scored):
    root, _ = scored
    assert "nothing to do" in said(scored, "sample") and "nothing" not in said(scored, "anew")
    names = sorted(path.name for path in (root / "anew").iterdir() if path.is_file())
    assert len(names) == NUM + 4
    for name in names:
        kept, anew = ((root / folder / name).read_bytes() for folder in ("kept", "anew"))
        assert kept == anew, name


def test_the_same_from_files_and_statistics(scored):
    root, _ = scored
    said(scored, "files")
    drawn, files = values(results(root / "drawn")), values(results(root / "files"))
    assert {*files} == {"fid", "kid", "precision", "recall"}  # "drawn" was asked for more
    for name, value in files.items():
        assert drawn[name] == pytest.approx(value, rel=1e-9), name
    assert results(root / "files")["reference"]["kind"] == "statistics"
    [place] = (root / "evaluated" / "kept").iterdir()
    assert place.name.startswith("real-val-") and results(place)["source"]["n"] == 50
    assert "the first 50 of 100 pictures" in said(scored, "default place")


def test_printed_again_without_drawing(scored):
    assert "looked at" not in said(scored, "again")


def test_another_metric_stands_beside_the_first_and_another_number_apart(scored):
    """Two calls give what one gives, in any order; what is of other pictures is kept under another name. The last tile
    of 20 pictures is half of one."""
    root, _ = scored
    first, both, more = (said(scored, name) for name in ("little", "another metric", "more"))
    assert "looked at 20/20" in first and "looked at" not in both
    assert "results.json: was of something else (source.n: 20 then, 29 now), and is results-1.json now" in more
    assert "was the last of fewer pictures: has 4, 8 are wanted; made anew" in more and "damaged" not in more
    assert "looked at 13/13" in more
    grown, before = results(root / "grown"), json.loads((root / "grown" / "results-1.json").read_text())
    assert {*values(before)} == {"fid", "kid"} and before["options"]["metrics"] == ["fid", "kid"]
    assert f"\nFID  {values(before)['fid']:.6g} " in first and before["source"]["n"] == 20
    assert any("biased upwards" in line for line in before["remarks"])
    assert any("KID: subsets of 20" in line for line in before["remarks"])
    assert {*values(grown)} == {"fid"} and grown["source"]["n"] == 29
    said(scored, "of files")
    assert values(grown)["fid"] == pytest.approx(values(results(root / "as_many"))["fid"], rel=1e-9)


def test_versions_that_features_depend_on(scored):
    book = json.loads((scored[0] / "drawn" / "features" / "samples" / "features.json").read_text())
    names = ("torch", "numpy", "pillow", "timm", "torch-fidelity")
    assert book["settings"]["versions"] == {name: metadata.version(name) for name in names}
    assert {*names} < {*results(scored[0] / "drawn")["versions"]}


def test_replayed(scored):
    root, answers = scored
    assert "reproduced, every figure to a millionth" in said(scored, "replay")
    assert f"looked at {NUM}/{NUM}" in said(scored, "replay")
    assert results(root / "drawn" / "replayed")["figures"] == results(root / "drawn")["figures"]
    code, _, err = answers["other weights"]
    assert code == 2 and "changed.json: not reproduced, first difference in source.weights: 000" in err


def test_per_class(scored):
    root, _ = scored
    text = said(scored, "per class")
    found = results(root / "balanced")
    assert found["source"]["n"] == 5 * CLASSES and found["figures"]["precision"]["definition"] == "adm"
    assert found["neighbours"] is None and "uneven" not in text and "ADM's npz" in text


def test_suspicious_pictures(scored):
    for part in ("100% of the pictures are compressed", "1 of 24 pictures (4.2%)", "24 pictures, 30 were asked for"):
        assert part in said(scored, "jpeg"), part
    assert f"of {SIDE} px, these have {SIDE + 8}" in said(scored, "large")


MISTAKES = {
    "IS": ["--metrics is", "run:mage has none"],
    "foreign": ["foreign.npz", "width 64", "2048"],
    "extractor": ["another extractor", "never compared"],
    "itself": ["same fingerprint"],
    "unlike": ["40 x 40", "32 x 32", "unlike sizes"],
    "float": ["float.npz", "float32", "uint8"],
    "one": ["too few pictures (1)"],
    "steps": ["--steps", "that a MAGE draws"],
    "twice": ["--per-class 5", "--num"],
    "no classes": ["--per-class 5", "knows no classes"],
    "readable": ["--metrics readable", "in a call of its own"],
    "both": ["--inception", "--features", "leave one out"],
    "neither": ["--inception", "--features"],
    "other settings": ["drawn", "seed 0 there, 5 here"],
    "file": ["--out stats", "stats.npz"],
    "tar": ["lone.tar: is a single tar", "folder"],
    "stranger": ["stranger: no pictures"],
    "nowhere": ["nowhere: no such folder", "see the spelling"],
    "no reference": ["nowhere: no such folder", "see the spelling"],
    "out is a file": ["--out float.npz: is a file"],
    "binary": ["foreign.npz: is no passport of a score"],
    "comparison": ["versus.json: is a comparison of two (--versus)", "results.json of one evaluation"],
    "weights": ["--weights raw", "is no run folder"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(scored, name):
    root, answers = scored
    code, _, err = answers[name]
    assert code == 2 and err.count("\n") == 1 and all(part in err for part in MISTAKES[name]), err
    assert len(err) < 400
    assert "--sample" not in err.replace("or make a sample data set with `mage-ds prepare --sample", "")
    assert not (root / "never").exists()


def test_killed_and_on_two_ranks(scored, tmp_path):
    """A lone process that is killed in the middle, then two ranks of a launch: the same figures to the last digit."""
    root, _ = scored
    line = [
        "evaluate",
        root / "mage",
        "--reference",
        root / "real",
        "--features",
        f"run:{root / 'mage'}",
        "--threads",
        1,
    ]
    line += ["--batch", BATCH, "-n", NUM, "--out", tmp_path / "out", "--metrics", "prc,fid"]
    program = [sys.executable, "-m", "mage_ds", *map(str, line)]
    tiles = tmp_path / "out" / "features" / "samples" / "tiles"
    with subprocess.Popen(program, env=environment(), stdout=subprocess.DEVNULL) as lone:
        while not (tiles.is_dir() and len(os.listdir(tiles)) >= 2):
            assert lone.poll() is None
            time.sleep(0.005)
        lone.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out" / "results.json").exists()
    text = run(*line, cwd=tmp_path).text
    assert text.count("written to") == 1
    found, drawn = results(tmp_path / "out")["figures"], results(root / "drawn")["figures"]
    assert found == {name: drawn[name] for name in ("fid", "precision", "recall")}  # "drawn" was asked for more
    assert results(tmp_path / "out")["machine"]["ranks"] == 2
    assert not (tmp_path / "out" / ".work").exists()


def test_the_published_row(tmp_path, capsys):
    figures = {"fid": {"value": 12.5, "interval": None, "n": 50_000}}
    figures["is"] = {"value": 80.0, "interval": [79, 81], "n": 9}
    results = {
        "figures": figures,
        "published": mage_ds.recipes.load_recipe("pretrain_vit_base").published,
        "extractor": {"name": "inception", "hash": "abc"},
        "remarks": ["one"],
    }
    engine_scored.said(results, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "published" in lines[0] and lines[1].split() == ["FID", "12.5", "-", "50,000", "11.1"]
    assert lines[2].split()[-3:] == ["81", "9", "81.2"] and "- one" in lines


def test_files_that_were_written_over_are_looked_at_anew(tmp_path):
    """Also where their names and sizes are the same; a folder of `sample` is a reference without its grid.png."""
    make_export(tmp_path / "mage")
    rng = np.random.default_rng(0)

    def write(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(tmp_path / folder / f"{i}.bmp")

    write("a"), write("b")
    line = ["evaluate", "a", "--reference", "b", "--features", "run:mage", "--metrics", "fid", "--neighbours", "off"]
    sample = ["sample", "mage", "--num", 6, "--out", "made"]
    made = ["evaluate", "a", "--reference", "made", *line[4:], "--out", "of_made"]
    first = several([*line, "--out", "o"], line, sample, made, cwd=tmp_path)
    assert [code for code, _, _ in first] == [0, 0, 0, 0], first
    assert results(tmp_path / "of_made")["reference"]["n"] == 6
    write("a")
    (code, _, wrong), (again, _, _) = several([*line, "--out", "o"], line, cwd=tmp_path)
    assert code == 2 and "source.files" in wrong and again == 0
    one, two = (values(results(folder)) for folder in (tmp_path / "evaluated" / "a").iterdir())
    assert one != two
