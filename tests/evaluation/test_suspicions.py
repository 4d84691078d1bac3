"""Mistakes that are met when sets of pictures are compared: one line that names each, and nothing where all is well."""

import re

import numpy as np
import pytest

from mage_ds.errors import UserError
from mage_ds.evaluation import suspicions

MINE = {"extractor": "inception", "weights": "abc"}
EVEN = np.arange(100) % 10
SUMS = np.random.default_rng(0).integers(0, 256, (100, 32), dtype=np.uint8)

REFUSED = {
    "no pictures": (suspicions.number, ["S", 0, None, ["fid"]], ["too few pictures (0)", "2 at least"]),
    "one picture": (suspicions.number, ["S", 1, 50, ["kid"]], ["too few pictures (1)", "2 at least"]),
    "few for IS": (suspicions.number, ["S", 9, None, ["fid", "is"]], ["(9)", "IS in 10 splits needs 10"]),
    "few for infinity": (suspicions.number, ["S", 19, None, ["fid_infinity"]], ["FID-infinity needs 20"]),
    "the same pictures": (
        suspicions.same,
        [{"source": "/a", "fingerprint": "f"}, {"source": "/b", "fingerprint": "f"}],
        ["--reference /b", "same fingerprint"],
    ),
    "other network": (
        suspicions.extractors,
        [MINE, {"extractor": "timm:resnet18", "weights": "abc"}, 512, "r.npz"],
        ["r.npz", "timm:resnet18 there, inception here", "never compared"],
    ),
    "other weights": (suspicions.extractors, [MINE, MINE | {"weights": "x"}, 2048, "r.npz"], ["weights x there"]),
    "foreign width": (suspicions.extractors, [MINE, None, 768, "r.npz"], ["width 768", "2048"]),
    "foreign and ours": (
        suspicions.extractors,
        [{"extractor": "run:mage", "weights": "x"}, None, 2048, "r"],
        ["run:mage"],
    ),
    "IS of others": (suspicions.needs, [["fid", "is"], None, "run:mage", True, "r"], ["run:mage", "--metrics fid"]),
    "PRC of statistics": (
        suspicions.needs,
        [["fid", "kid", "prc"], 1008, "inception", False, "r.npz"],
        ["--metrics kid,prc", "r.npz holds only", "or --metrics fid"],
    ),
}
REMARKED = {
    "unlike sizes": (suspicions.sizes, ["R", {(32, 32): 9, (64, 48): 2}, 32], ["9 of 32x32", "resized to 32 px"]),
    "JPEG": (suspicions.compressed, ["S", {".JPG": 2, ".png": 6, ".jpeg": 2}], ["40%", "JPEG", "PNG or npz"]),
    "duplicates": (suspicions.duplicates, ["S", SUMS[[0, 1, 2, 1, 1]]], ["2 of 5 pictures (40.0%)"]),
    "copies": (suspicions.copies, ["S", SUMS[[3, 50, 60, 3]], SUMS[:40]], ["2 of 4 pictures (50.0%)", "reference"]),
    "fewer than asked": (suspicions.number, ["S", 20_000, 50_000, ["fid"]], ["20,000 pictures, 50,000 were asked"]),
    "uneven": (suspicions.balance, ["S", np.repeat([0, 1, 2], [30, 10, 20])], ["30", "10", "3.0 times as many"]),
    "a class lacks": (suspicions.balance, ["S", EVEN[EVEN < 9], 10], ["and some have none"]),
    "other size": (suspicions.resolution, [32, 256, "r.npz"], ["of 256 px, these have 32", "--size 32"]),
    "unknown size": (suspicions.resolution, [256, None, "r.npz"], ["does not say", "256 px"]),
    "foreign statistics": (suspicions.extractors, [MINE, None, 2048, "r.npz"], ["taken to be Inception's"]),
}
WELL = {
    "sizes": (suspicions.sizes, ["S", {(32, 32): 480}, 32]),
    "PNG": (suspicions.compressed, ["S", {".png": 9}]),
    "no files": (suspicions.compressed, ["S", {}]),
    "all different": (suspicions.duplicates, ["S", SUMS]),
    "no copies": (suspicions.copies, ["S", SUMS[50:], SUMS[:40]]),
    "enough": (suspicions.number, ["S", 50_000, 50_000, ["fid"]]),
    "few but enough": (suspicions.number, ["S", 9, 9, ["fid", "kid", "prc"]]),
    "even": (suspicions.balance, ["S", EVEN, 10]),
    "no labels": (suspicions.balance, ["S", np.full(9, -1)]),
    "same size": (suspicions.resolution, [256, 256, "r.npz"]),
    "same extractor": (suspicions.extractors, [MINE, dict(MINE), 2048, "r.npz"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, given, parts = REFUSED[name]
    with pytest.raises(UserError) as caught:
        call(*given)
    said = str(caught.value)
    assert "\n" not in said and all(part in said for part in parts), said


@pytest.mark.parametrize("name", REMARKED)
def test_remarked(name):
    call, given, parts = REMARKED[name]
    [said] = call(*given)
    assert "\n" not in said and all(part in said for part in parts), said


@pytest.mark.parametrize("name", WELL)
def test_nothing_where_all_is_well(name):
    call, given = WELL[name]
    assert call(*given) == []


def test_what_is_well():
    suspicions.same({"source": "/a", "fingerprint": "f"}, {"source": "/a", "fingerprint": "g"})  # train/ and val/
    suspicions.same({"source": "/a"}, {"source": "/b", "fingerprint": None})  # a model
    suspicions.needs(["fid", "is", "kid", "prc"], 1008, "inception", True, "r")
    suspicions.needs(["fid"], None, "run:mage", False, "r")


def test_kid_subset():
    assert suspicions.subset(1000, 5000, 1000) == (1000, [])
    size, [said] = suspicions.subset(1000, 64, 360)
    assert size == 64 and re.search("64 pictures instead of 1,000", said)
