"""Token caches as files: what a training reads of them, damage, and how they come about."""

import errno
import json
import os
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mage_ds import keyed, recipes
from mage_ds.errors import UserError
from mage_ds.inputs import token_cache
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.token_cache import Parts

N, VIEWS, WIDTH, CODES, SIZE = 23, 3, 4, 50, 8
SETTINGS = {"data": {"train": "a", "val": "b"}, "codes": CODES, "tokens": WIDTH, "views": VIEWS, "seed": 0}


def write(parts: Parts, tokens: np.ndarray, valid: np.ndarray) -> None:
    for view, first in parts.missing():
        rows = slice(first, first + parts.length(first))
        parts.write(view, first, tokens[rows, view], valid[rows, view])


def make(out, settings=SETTINGS, splits=("train", "val")) -> SimpleNamespace:
    """A cache of random tokens, by the same steps as `tokenize` takes; what it holds."""
    draw, made = np.random.default_rng(1), {}
    with ExitStack() as held:
        facts = token_cache.begin(out, settings, ["x", "y"], held)
        for split in splits:
            n, views = (N, VIEWS) if split == "train" else (6, 1)
            tokens = draw.integers(CODES, size=(n, views, WIDTH)).astype(np.uint16)
            valid, labels = draw.random((n, views)) < 0.9, draw.integers(-1, 2, size=n)
            parts = Parts(out / split, n, views, WIDTH, SIZE)
            write(parts, tokens, valid)
            facts["splits"][split] = parts.join(labels)
            made[split] = SimpleNamespace(tokens=tokens, valid=valid, labels=labels)
        token_cache.finish(out, facts)
    return SimpleNamespace(**made)


@pytest.fixture
def made(tmp_path):
    return tmp_path / "tokens", make(tmp_path / "tokens")


def read(stream, batches: int) -> list:
    found = [next(stream) for _ in range(batches)]
    stream.close()
    return found


def expected(position: int, seed: int) -> tuple[int, int]:
    """(epoch, index) of one position of the stream."""
    epoch, place = divmod(position, N)
    return epoch, int(keyed.permutation(seed, "order", epoch, N)[place])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_stream_against_a_plain_loop(made, world):
    out, held = made
    cache, seed, batch, micro, start = open_catalog(out, "train", tokens=True), 7, 12, 2, 12
    positions = []
    for rank in range(world):
        place = {"rank": rank, "world": world}
        common = {"seed": seed, "position": start, "batch": batch, "micro_batch": micro, "device": "cpu"}
        accumulation = batch // micro // world
        for k, found in enumerate(read(token_cache.stream(cache, **common, **place), 8 * accumulation)):
            step, a = divmod(k, accumulation)
            for row in range(micro):
                position = start + step * batch + (a * world + rank) * micro + row
                epoch, i = expected(position, seed)
                assert (found.epoch[row], found.index[row]) == (epoch, i)
                assert found.tokens[row, 0].tolist() == held.train.tokens[i, epoch % VIEWS].tolist()
                assert found.valid[row] == held.train.valid[i, epoch % VIEWS]
                assert found.labels[row] == held.train.labels[i]
                positions.append(position)
        assert found.images is None and found.tokens.shape == (micro, 1, WIDTH)
        assert (found.tokens.dtype, found.labels.dtype, found.valid.dtype) == (torch.int64, torch.int64, torch.float32)
    assert sorted(positions) == list(range(start, start + 8 * batch))  # each once, over four epochs


def test_a_batch_that_does_not_divide(made):
    cache = open_catalog(made[0], "train", tokens=True)
    with pytest.raises(ValueError, match="not a multiple"):
        token_cache.stream(cache, seed=0, position=0, batch=6, micro_batch=4, rank=0, world=1, device="cpu")


def test_evaluation_shows_each_once_and_pads(made):
    out, held = made
    cache = open_catalog(out, "val", tokens=True)
    batches = list(token_cache.evaluation(cache, [5, 0, 3, 2, 4], batch=4, device="cpu"))
    assert [batch.index.tolist() for batch in batches] == [[5, 0, 3, 2], [4, -1, -1, -1]]
    assert batches[0].tokens[:, 0].tolist() == held.val.tokens[[5, 0, 3, 2], 0].tolist()
    assert batches[1].valid.tolist() == [float(held.val.valid[4, 0]), 0, 0, 0]
    assert batches[1].labels.tolist() == [held.val.labels[4], -1, -1, -1]


def test_tokens_stay_on_the_disk(made):
    out, held = made
    cache = open_catalog(out, "train", tokens=True)
    assert isinstance(cache.tokens, np.memmap) and cache.tokens.dtype == np.uint16
    assert (cache.n, cache.views, cache.classes, cache.label(3)) == (N, VIEWS, ["x", "y"], held.train.labels[3])
    assert (np.load(out / "train" / "tokens.npy") == held.train.tokens).all()  # plain files that others can read
    assert sorted(p.name for p in (out / "train").iterdir()) == ["labels.npy", "tokens.npy", "valid.npy"]


def test_splits(made, tmp_path):
    make(tmp_path / "alone", splits=("train",))
    assert open_catalog(tmp_path / "alone", "val", tokens=True) is None
    assert open_catalog(made[0], "val", tokens=True).n == 6


def test_whoever_needs_pictures_is_told(made):
    with pytest.raises(UserError, match="holds tokens, and pictures are needed"):
        open_catalog(made[0], "train")


def test_fingerprint_tells_settings_apart(tmp_path):
    seen = {token_cache.fingerprint(SETTINGS)}
    for key in SETTINGS:
        seen.add(token_cache.fingerprint(SETTINGS | {key: "other"}))
    assert len(seen) == len(SETTINGS) + 1
    make(tmp_path / "one"), make(tmp_path / "two", SETTINGS | {"seed": 1})
    one, two = (open_catalog(tmp_path / name, "train", tokens=True).fingerprint for name in ("one", "two"))
    assert one == token_cache.fingerprint(SETTINGS) != two


# --- damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"garbage" * 100)


def gone(path):
    path.unlink()


def other_shape(path):
    np.save(path, np.zeros((3, 1), dtype=np.uint16))


def open_bracket(path):
    path.write_bytes(path.read_bytes().replace(b"(23, 3, 4)", b"(23, 3, 4("))


def long_header(path):
    path.write_bytes(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000)


def other_seed(path):
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def other_format(path):
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))


def nested(path):
    path.write_text("[" * 200000)


def with_splits(splits):
    def harm(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"splits": splits}))

    return harm


@pytest.mark.parametrize(
    "file, harm, says",
    [
        ("train/tokens.npy", cut, "cut off"),
        ("train/tokens.npy", empty, "cut off"),
        ("train/tokens.npy", garbage, "cut off or foreign"),
        ("train/tokens.npy", open_bracket, "cut off or foreign"),
        ("train/tokens.npy", long_header, "cut off or foreign"),
        ("train/tokens.npy", gone, "missing"),
        ("train/tokens.npy", other_shape, "instead of uint16 (23, 3, 4)"),
        ("train/labels.npy", cut, "cut off"),
        ("train/valid.npy", gone, "missing"),
        ("tokens.json", gone, "is missing"),
        ("tokens.json", cut, "not readable"),
        ("tokens.json", garbage, "not readable"),
        ("tokens.json", other_seed, "fingerprint"),
        ("tokens.json", other_format, "format 9"),
        ("tokens.json", nested, "not readable"),
        *(
            ("tokens.json", with_splits(splits), "does not tell how many pictures")
            for splits in (["train"], {}, {"val": {"n": 6}}, {"train": {"n": "23"}}, {"train": 23}, None)
        ),
    ],
)
def test_damage_is_one_line_with_the_file_and_the_remedy(made, file, harm, says):
    out, _ = made
    harm(out / file)
    with pytest.raises(UserError) as error:
        open_catalog(out, "train", tokens=True)
    said = str(error.value)
    assert str(out / file) in said and says in said and "\n" not in said
    assert "mage-ds tokenize" in said or "make it anew" in said


def test_damage_inside_a_file(made):
    out, _ = made
    data = bytearray((out / "train" / "tokens.npy").read_bytes())
    data[-1] ^= 0xFF  # the last token is now no code
    (out / "train" / "tokens.npy").write_bytes(data)
    cache = open_catalog(out, "train", tokens=True)
    with pytest.raises(UserError, match=r"tokens.npy.*no code"):
        cache.rows(np.array([VIEWS - 1]), np.array([N - 1]))
    with pytest.raises(UserError, match=r"tokens.npy.*checksum"):
        token_cache.check(out, token_cache.read_facts(out))


def test_an_unfinished_one_is_not_read(tmp_path):
    with ExitStack() as held:
        token_cache.begin(tmp_path / "t", SETTINGS, [], held)
    with pytest.raises(UserError, match="not finished it; run the same command again"):
        open_catalog(tmp_path / "t", "train", tokens=True)


# --- writing


def test_parts_are_there_or_not(tmp_path):
    parts = Parts(tmp_path / "train", N, VIEWS, WIDTH, SIZE)
    every = [(view, first) for view in range(VIEWS) for first in (0, 8, 16)]
    assert parts.missing() == every
    parts.write(1, 16, np.zeros((7, WIDTH), dtype=int), np.ones(7, dtype=bool))
    (tmp_path / "train" / "parts" / ".000_000000000.npz.77.part").write_bytes(b"of a killed process")
    assert parts.missing() == [part for part in every if part != (1, 16)]
    write(parts, np.ones((N, VIEWS, WIDTH), dtype=int), np.ones((N, VIEWS), dtype=bool))
    (tmp_path / "train" / ".tokens.npy.77.part").write_bytes(b"of a killed process")
    facts = parts.join(np.zeros(N))
    assert (facts["n"], facts["unreadable"], parts.missing(), parts.bytes_missing()) == (N, 0, [], 0)
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["labels.npy", "tokens.npy", "valid.npy"]
    assert (np.load(tmp_path / "train" / "tokens.npy")[16:, 1] == 0).all()


@pytest.mark.parametrize("harm", [cut, empty, garbage])
def test_a_damaged_part_is_named(tmp_path, harm):
    parts = Parts(tmp_path / "train", N, 1, WIDTH, SIZE)
    write(parts, np.ones((N, 1, WIDTH), dtype=int), np.ones((N, 1), dtype=bool))
    bad = tmp_path / "train" / "parts" / "000_000000008.npz"
    harm(bad)
    with pytest.raises(UserError, match=f"{bad}.*remove it and run the same"):
        parts.join(np.zeros(N))
    bad.unlink()
    assert parts.missing() == [(0, 8)]


def test_room_that_is_needed(tmp_path):
    parts = Parts(tmp_path / "train", N, 1, WIDTH, SIZE)
    row = 2 * WIDTH + 1
    assert parts.bytes_missing() == 2 * N * row
    parts.write(0, 0, np.zeros((8, WIDTH), dtype=int), np.ones(8, dtype=bool))
    assert parts.bytes_missing() == (2 * N - 8) * row


def test_a_full_disk_is_one_line_and_keeps_what_is_done(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "train", N, 1, WIDTH, SIZE)
    parts.write(0, 0, np.zeros((8, WIDTH), dtype=int), np.ones(8, dtype=bool))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*what is done is kept"):
        parts.write(0, 8, np.zeros((8, WIDTH), dtype=int), np.ones(8, dtype=bool))
    assert parts.missing() == [(0, 8), (0, 16)]
    assert [p.name for p in (tmp_path / "train" / "parts").iterdir()] == ["000_000000000.npz"]


def test_one_writer_at_a_time(tmp_path):
    with ExitStack() as held, pytest.raises(UserError, match="another process is writing it"):
        token_cache.begin(tmp_path / "t", SETTINGS, [], held)
        token_cache.begin(tmp_path / "t", SETTINGS, [], held)
    with ExitStack() as held:
        assert not token_cache.begin(tmp_path / "t", SETTINGS, [], held)["complete"]


def test_what_begin_refuses(tmp_path, made):
    foreign, file, named = tmp_path / "foreign", tmp_path / "file", recipes.augmentations()
    make(tmp_path / "weak", SETTINGS | {"augmentation": named["weak"]})
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    file.write_text("x")
    cases = {
        foreign: (SETTINGS, "holds files but no tokens.json"),
        file: (SETTINGS, "is a file"),
        made[0]: (SETTINGS | {"seed": 3, "views": 4}, "views 3 there, 4 here; seed 0 there, 3 here"),
        tmp_path / "weak": (SETTINGS | {"augmentation": named["none"]}, "augmentation weak there, none here"),
    }
    for out, (settings, says) in cases.items():
        before = sorted(out.rglob("*"))
        with ExitStack() as held, pytest.raises(UserError, match=says):
            token_cache.begin(out, settings, [], held)
        assert sorted(out.rglob("*")) == before
    assert [p.name for p in foreign.iterdir()] == ["letter.txt"]


def test_a_split_that_was_removed_is_made_again(made):
    out, _ = made
    (out / "val" / "valid.npy").unlink()
    with ExitStack() as held:
        facts = token_cache.begin(out, SETTINGS, ["x", "y"], held)
    assert not facts["complete"] and not json.loads((out / "tokens.json").read_text())["complete"]
    assert Parts(out / "val", 6, 1, WIDTH, SIZE).missing() == [(0, 0)]
    assert Parts(out / "train", N, VIEWS, WIDTH, SIZE).missing() == []
