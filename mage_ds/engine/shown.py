"""What the picture sheet of an evaluation shows: chosen by features, then read, or drawn, again by index."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mage_ds import keyed
from mage_ds.engine.sources import Source
from mage_ds.evaluation import neighbours
from mage_ds.evaluation.feature_set import FeatureSet
from mage_ds.report import sheet

MOST = 100_000  # real pictures that neighbours are looked for among, where nobody asks for it
_ASKED = 2000  # real pictures whose own neighbours say what is near
_ENDS = 8  # of the densest samples, and of those in the emptiest regions


def show(
    path: Path,
    samples: FeatureSet,
    source: Source,
    real: tuple[FeatureSet, Source] | np.ndarray | None,
    counted: Callable,
) -> dict | None:
    """Writes the sheet; the same samples each time.

    Args: real: the reference's features and pictures; or features float32 (m, D) alone, whose pictures are not here;
    None: neighbours are not looked for; counted: as of `figures.figures`.
    Returns: what the neighbours say, for results.json; None where there are none.
    """
    order = keyed.permutation(0, "sheet", 0, samples.n)
    random = order[: sheet.RANDOM]
    if real is None:
        sheet.save(path, random=_look(source, random, samples.batch))
        return None
    rows = np.concatenate([some for (some,) in samples.chunks("features")])
    with counted(real[0].n if isinstance(real, tuple) else len(real), "real picture", "neighbours among") as advance:
        found = neighbours.nearest(rows, _chunks(real), advance=advance)
    said = neighbours.memorised(found, _of_real(real))
    density = neighbours.by_density(found)
    ends = {"best": density[:_ENDS], "worst": density[::-1][:_ENDS]}
    drawn = _look(source, np.concatenate([random, *ends.values()]), samples.batch)
    first, texts = drawn[: len(random)], {name: _texts(found, index, -1) for name, index in ends.items()}
    best, worst = np.split(drawn[len(random) :], 2)
    more = {}
    if isinstance(real, tuple):
        index = random[: sheet.COLUMNS]
        near = [found.index[index, k] for k in range(min(sheet.NEAREST, real[0].n))]
        pictures = np.split(_look(real[1], np.concatenate(near), real[0].batch), len(near))
        beneath = [(each, _texts(found, index, k)) for k, each in enumerate(pictures)]
        more = {"samples": first[: sheet.COLUMNS], "nearest": beneath}
    sheet.save(path, random=first, best=(best, texts["best"]), worst=(worst, texts["worst"]), **more)
    return said._asdict()


def _chunks(real) -> Iterator[tuple]:
    if isinstance(real, tuple):
        return real[0].chunks("index", "features")
    return iter([(np.arange(len(real)), real)])


def _of_real(real) -> neighbours.Nearest:
    """The nearest other real picture of some of them."""
    n = real[0].n if isinstance(real, tuple) else len(real)
    asked = np.sort(keyed.permutation(0, "real neighbours", 0, n)[:_ASKED])
    rows = real[0].rows(asked, "features") if isinstance(real, tuple) else real[asked]
    return neighbours.nearest(rows, _chunks(real), 1, itself=asked)


def _texts(found: neighbours.Nearest, index: np.ndarray, k: int) -> list[str]:
    return [f"{distance:.3g}" for distance in found.distances[index, k]]


def _look(source: Source, index: np.ndarray, batch: int) -> np.ndarray:
    """Pictures of any indices, in pieces of `batch`, which a network wants."""
    read: Callable = source.read
    pieces = [index[at : at + batch] for at in range(0, len(index), batch)]
    return np.concatenate([read(np.resize(piece, batch))[: len(piece)] for piece in pieces])
