"""A folder of features: begun, continued, refused, damaged; what is read is what was written, in order of index."""

import json

import numpy as np
import pytest

from mage_ds.errors import UserError
from mage_ds.evaluation.feature_set import Damaged, FeatureSet

SETTINGS = {
    "extractor": "run:x",
    "weights": "a" * 64,
    "versions": {"torch": "1"},
    "source": {"seed": 0, "source": "/a"},
}
N, BATCH = 10, 4


def arrays(tile, rows=BATCH, logits=True):
    tile = tile[:rows]
    return {
        "features": tile[:, None] + np.float32([0.5, 0.25, 0]),
        "logits": np.stack([tile, -tile], axis=1).astype(np.float32) if logits else None,
        "labels": tile % 3,
        "sums": np.repeat(tile[:, None], 32, axis=1).astype(np.uint8),
        "sizes": np.stack([tile + 20, tile + 30], axis=1),
    }


def filled(folder, n=N, **options):
    features = FeatureSet.begin(folder, SETTINGS, n, BATCH)
    for tile in reversed(features.missing()):
        features.write(tile, **arrays(tile, **options))
    return features


def test_what_is_read_is_what_was_written(tmp_path):
    filled(tmp_path / "set")
    features = FeatureSet(tmp_path / "set")
    assert (features.n, features.batch, features.missing()) == (N, BATCH, [])
    assert features.settings == SETTINGS
    names = ("index", "features", "logits", "labels", "sums", "sizes")
    columns = zip(*features.chunks(*names), strict=True)
    read = {name: np.concatenate(parts) for name, parts in zip(names, columns, strict=True)}
    expected = arrays(np.arange(N), N) | {"index": np.arange(N)}
    assert {name: len(value) for name, value in read.items()} == dict.fromkeys(names, N)
    assert all((read[name] == expected[name]).all() for name in names)
    assert [array.dtype for array in read.values()] == ["int64", "float32", "float32", "int64", "uint8", "int32"]
    index = np.array([9, 0, 5, 9])
    assert (features.rows(index, "features") == expected["features"][index]).all()
    assert not list((tmp_path / "set" / ".work").iterdir())


def test_without_logits(tmp_path):
    features = filled(tmp_path / "set", logits=False)
    assert len(next(features.chunks("features"))[0]) == BATCH
    with pytest.raises(KeyError):
        next(features.chunks("logits"))


def test_more_and_fewer(tmp_path):
    folder = tmp_path / "set"
    filled(folder)
    more = FeatureSet.begin(folder, SETTINGS, 14, BATCH)
    assert [list(tile) for tile in more.missing()] == [[12, 13, 14, 15]]
    assert more.discard_damaged() == []  # its last tile is whole
    fewer = FeatureSet.begin(folder, SETTINGS, 5, BATCH)
    assert fewer.missing() == [] and [len(index) for (index,) in fewer.chunks("index")] == [4, 1]
    assert FeatureSet(folder).n == 14


def test_the_last_tile_of_fewer_pictures_is_made_again_for_more(tmp_path):
    folder = tmp_path / "set"
    features = FeatureSet.begin(folder, SETTINGS, 6, BATCH)
    for tile in features.missing():
        features.write(tile, **arrays(tile, rows=min(BATCH, 6 - tile[0])))
    assert sum(len(rows) for (rows,) in features.chunks("features")) == 6
    more = FeatureSet.begin(folder, SETTINGS, 8, BATCH)
    (line,) = more.discard_damaged()
    assert "000004.npz: was the last of fewer pictures: has 2, 4 are wanted" in line and "damaged" not in line
    assert [list(tile) for tile in more.missing()] == [[4, 5, 6, 7]]


def test_other_settings_are_refused(tmp_path):
    filled(tmp_path / "set")
    FeatureSet.begin(tmp_path / "set", SETTINGS | {"versions": {"torch": "2"}}, N, BATCH)
    FeatureSet.begin(tmp_path / "set", SETTINGS | {"source": {"seed": 0, "source": "/moved"}}, N, BATCH)
    other = SETTINGS | {"weights": "b" * 64, "source": {"seed": 1, "source": "/a"}}
    said = "aaaaaaaaaaaa there, bbbbbbbbbbbb here; source.seed 0 there, 1 here"
    refused(lambda: FeatureSet.begin(tmp_path / "set", other, N, BATCH), said)
    refused(lambda: FeatureSet.begin(tmp_path / "set", SETTINGS, N, 5), "batch 4 there, 5 here")


def test_what_is_no_such_folder(tmp_path):
    refused(lambda: FeatureSet(tmp_path), "holds no features")
    (tmp_path / "file").touch()
    refused(lambda: FeatureSet.begin(tmp_path / "file", SETTINGS, N, BATCH), "is a file")
    for text in ("{", '{"n": 0, "batch": 4, "settings": {}}', '{"n": 3}', "[]"):
        (tmp_path / "features.json").write_text(text)
        refused(lambda: FeatureSet.begin(tmp_path, SETTINGS, N, BATCH), "not readable")


def flipped(path):
    data = bytearray(path.read_bytes())
    at = data.index(np.float32(4.5).tobytes())  # a feature of picture 4
    data[at] ^= 1
    path.write_bytes(data)


def pickled(path):
    np.savez(path, features=np.array([{}], dtype=object))


BAD = {
    "a bit": flipped,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:400]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no tile"),
    "a pickle": pickled,
    "fewer rows": lambda path: np.savez(path, **arrays(np.arange(4, 6))),
    "unlike rows": lambda path: np.savez(path, **arrays(np.arange(4, 8)) | {"sums": np.zeros((3, 32), np.uint8)}),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_said_and_mended(name, tmp_path):
    features = filled(tmp_path / "set")
    BAD[name](features.path(4))
    how = "was the last of fewer" if name == "fewer rows" else "damaged"
    with pytest.raises(Damaged, match=rf"000004\.npz: {how}"):
        features.read(np.arange(4, 8))
    refused(lambda: features.rows(np.array([1, 5]), "features"), f"000004.npz: {how}")
    assert (features.rows(np.array([1]), "features") == arrays(np.array([1]), 1)["features"]).all()
    refused(lambda: list(features.chunks("features")), "start the same command again")
    assert [list(tile) for tile in features.missing()] == [[4, 5, 6, 7]]
    features.write(np.arange(4, 8), **arrays(np.arange(4, 8)))
    BAD[name](features.path(4))
    assert len(features.discard_damaged()) == (name != "missing") and len(features.missing()) == 1


def test_no_numbers_are_never_written(tmp_path):
    features = FeatureSet.begin(tmp_path / "set", SETTINGS, N, BATCH)
    for name in ("features", "logits"):
        given = arrays(np.arange(4))
        given[name][2, 1] = np.nan
        refused(lambda given=given: features.write(np.arange(4), **given), "no numbers")
    assert len(features.missing()) == 3


def test_a_second_beginning_has_the_first_ones_way(tmp_path):
    features = FeatureSet.begin(tmp_path / "set", SETTINGS, N, BATCH)
    book = json.loads((tmp_path / "set" / "features.json").read_text())
    assert book == {"n": N, "batch": BATCH, "settings": SETTINGS}
    again = FeatureSet.begin(tmp_path / "set", SETTINGS, N - 1, BATCH)
    assert (features.n, again.n) == (N, N - 1)


def refused(action, said):
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert said in message and message.isprintable(), message
