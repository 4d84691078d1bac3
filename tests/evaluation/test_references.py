"""Statistics of a reference: other people's layouts and ours, and everything else in one line."""

import pickle

import numpy as np
import pytest
import torch

from mage_ds.errors import UserError
from mage_ds.evaluation import references
from mage_ds.evaluation.feature_set import FeatureSet
from mage_ds.evaluation.references import read_statistics, statistics_of, write_statistics

WIDTH, N, BATCH = 6, 23, 5
RNG = np.random.default_rng(0)
ROWS = RNG.normal(3, 2, (N, WIDTH)).astype(np.float32)
MU, SIGMA = ROWS.astype(np.float64).mean(0), np.cov(ROWS.astype(np.float64), rowvar=False)


@pytest.fixture
def features(tmp_path):
    settings = {"extractor": "run:x", "weights": "a" * 64, "width": WIDTH}
    settings |= {"source": {"source": "/d", "fingerprint": "f" * 64, "height": 32, "width": 32}}
    made = FeatureSet.begin(tmp_path / "set", settings, N, BATCH)
    for tile in made.missing():
        rows = np.resize(ROWS, (25, WIDTH))[tile]  # the last two pictures are not wanted
        labels, sums, sizes = (np.zeros((BATCH, *more), int) for more in ((), (32,), (2,)))
        made.write(tile, features=rows, logits=None, labels=labels, sums=sums, sizes=sizes)
    return made


def test_of_features(features):
    found = statistics_of(features)
    assert np.allclose(found.mean, MU, atol=1e-12) and np.allclose(found.covariance, SIGMA, atol=1e-12)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    assert (found.n, found.size, found.fingerprint) == (N, 32, "f" * 64)
    assert found.extractor == {"extractor": "run:x", "weights": "a" * 64, "width": WIDTH}
    assert (found.features == ROWS).all() and found.features.dtype == np.float32


def test_kept_rows_are_a_draw(features, monkeypatch):
    monkeypatch.setattr(references, "ROWS", 9)
    kept = statistics_of(features).features
    index = [int(np.flatnonzero((row == ROWS).all(1))[0]) for row in kept]
    assert len(index) == 9 and index == sorted(set(index)) and index[-1] > 9
    assert (kept == statistics_of(features).features).all()


def test_written_and_read(features, tmp_path):
    wanted = statistics_of(features)
    write_statistics(tmp_path / "new" / "stats.npz", wanted)
    found = read_statistics(tmp_path / "new" / "stats.npz")
    assert (found.mean == wanted.mean).all() and (found.covariance == wanted.covariance).all()
    assert (found.features == wanted.features).all()
    assert found[2:5] == wanted[2:5] and found.fingerprint == wanted.fingerprint
    assert "23 pictures" in found.origin and "run:x" in found.origin
    with np.load(tmp_path / "new" / "stats.npz", allow_pickle=False) as file:  # as pytorch-fid does
        assert (file["mu"] == wanted.mean).all() and (file["sigma"] == wanted.covariance).all()


def test_foreign_layouts(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=MU, sigma=SIGMA)  # pytorch-fid, clean-fid
    single = SIGMA.astype(np.float32)
    pictures = np.zeros((3, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", mu=MU, sigma=single, mu_s=MU[:2], sigma_s=single[:2, :2], arr_0=pictures)
    for name, sigma in (("fid", SIGMA), ("adm", single)):
        found = read_statistics(tmp_path / f"{name}.npz")
        assert (found.mean == MU).all() and np.allclose(found.covariance, sigma, atol=1e-12)
        assert found.covariance.dtype == np.float64
        assert (found.n, found.extractor, found.size, found.features) == (None,) * 4


def test_one_picture_has_no_covariance(features):
    features.n = 1
    with pytest.raises(UserError, match="1 picture has no covariance"):
        statistics_of(features)


def saved(**arrays):
    return lambda path: np.savez(path, **({"mu": MU, "sigma": SIGMA} | arrays))


def truncated(path):
    np.savez(path, mu=MU, sigma=SIGMA)
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path):
    np.savez(path, mu=MU, sigma=SIGMA)
    data = path.read_bytes()
    path.write_bytes(data.replace(MU[:1].tobytes(), MU[1:2].tobytes()))


SKEWED = SIGMA + np.triu(np.full_like(SIGMA, 0.01), 1)
BAD = {
    "missing": (lambda path: None, "no such file"),
    "text": (lambda path: path.write_text("no statistics"), "is no whole .npz"),
    "empty": (lambda path: path.write_bytes(b""), "is no whole .npz"),
    "truncated": (truncated, "is no whole .npz"),
    "a bit": (flipped, "is no whole .npz (Bad CRC"),
    "pictures": (lambda path: np.savez(path, arr_0=np.zeros((2, 2, 2, 3), np.uint8)), "holds pictures (arr_0)"),
    "nothing": (lambda path: np.savez(path), "holds no statistics (nothing)"),
    "no sigma": (lambda path: np.savez(path, mu=MU), "no statistics (mu)"),
    "objects": (saved(mu=np.array([{}] * WIDTH)), "is a pickle"),
    "text in it": (saved(mu=np.array(["x"] * WIDTH)), "must be floating point"),
    "whole numbers": (saved(sigma=np.eye(WIDTH, dtype=np.int64)), "sigma is int64"),
    "shape of mu": (saved(mu=MU[None]), "mu is float64 (1, 6)"),
    "shape of sigma": (saved(sigma=SIGMA[:3]), "sigma is float64 (3, 6), must be floating point (6, 6)"),
    "shape of features": (saved(features=ROWS[:, :3]), "features is float32 (23, 3)"),
    "not finite": (saved(mu=np.where(np.arange(WIDTH) == 1, np.nan, MU)), "mu holds values that are no numbers"),
    "not symmetric": (saved(sigma=SKEWED), "no covariance"),
    "negative": (saved(sigma=SIGMA - 30 * np.eye(WIDTH)), "no covariance"),
    "n": (saved(n=np.array([1, 2])), "n is int64 (2,)"),
    "torch": (lambda path: torch.save({"mu": MU}, path), "is a pickle, such as torch-fidelity's cache"),
    "a pickle": (
        lambda path: path.write_bytes(pickle.dumps({"mu": MU})),
        "is a pickle, such as torch-fidelity's cache",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused_in_one_line(name, tmp_path):
    make, said = BAD[name]
    path = tmp_path / "stats.npz"
    make(path)
    with pytest.raises(UserError) as caught:
        read_statistics(path)
    message = str(caught.value)
    assert said in message and "--make-reference" in message and message.isprintable(), message


def test_a_header_that_claims_terabytes_is_not_believed(tmp_path):
    import io
    import zipfile

    head = io.BytesIO()
    claim = {"descr": "<f8", "fortran_order": False, "shape": (10**7, 10**7)}
    np.lib.format.write_array_header_1_0(head, claim)
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        with archive.open("mu.npy", "w") as file:
            np.save(file, MU)
        archive.writestr("sigma.npy", head.getvalue())
    with pytest.raises(UserError, match="must be floating point"):
        read_statistics(tmp_path / "s.npz")
