"""bench listing: a small run prints the table and leaves nothing."""

import os

import pytest

from mage_ds.errors import UserError
from mage_ds.tasks import bench_listing


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.parametrize("tars", [False, True])
def test_a_small_one(tmp_path, capsys, monkeypatch, tars):
    monkeypatch.setattr(bench_listing, "LINKS", 100)
    bench_listing.listing(files=250, folders=7, dir=str(tmp_path), tars=tars)
    text = capsys.readouterr().out
    for part in ("250 pictures in 7", "first listing", "with its cache", "position 1,000,000"):
        assert part in text
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_made(tmp_path):
    with pytest.raises(UserError, match="nowhere: No such file or directory; name a folder"):
        bench_listing.listing(files=1, folders=1, dir=str(tmp_path / "nowhere"))
