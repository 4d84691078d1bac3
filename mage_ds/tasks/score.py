"""mage-ds evaluate SOURCE --reference REF --metrics fid,is,kid,prc: from noise, or from files, to figures.

source -> tiles of features, by any number of processes -> figures, neighbours -> results.json, sheet.png, a table
"""

from pathlib import Path

from mage_ds.engine import extracting, extractors, process, scored, scoring, sources
from mage_ds.errors import UserError
from mage_ds.evaluation import references
from mage_ds.evaluation.feature_set import FeatureSet
from mage_ds.report import passport


def score(
    source,
    *,
    reference,
    metrics=None,
    inception=None,
    features: str | None = None,
    definition: str | None = None,
    kid_subset: int = 1000,
    neighbours: str = "auto",
    data=None,
    num: int | None = None,
    per_class: int | None = None,
    tokenizer=None,
    class_label: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    temperature: float | None = None,
    token_temperature: float | None = None,
    order: str | None = None,
    drop: float | None = None,
    guidance: float | None = None,
    guidance_schedule: str | None = None,
    precision: str = "float32",
    checkpoint: int | None = None,
    weights: str | None = None,
    round: bool = False,
    batch: int | None = None,
    threads: int = 1,
    keep=None,
    out=None,
) -> dict | None:
    """Figures of pictures beside real ones, computed from features; prints a table, writes results.json and sheet.png.

    Any number of processes may run it on one `out`, as ranks of a launch or not: each picture is looked at once, what
    was killed goes on, and the figures do not depend on who did what.

    Args: source: a MAGE (whatever `stored.open_model` opens), whose pictures are drawn, looked at and thrown away; or
    pictures (see `sources.open_source`); reference: pictures, of train/ where there is one (`DATA:val`: the other),
    resized to the size of the source's; or an .npz of statistics; metrics: of figures.METRICS, by default fid, kid,
    prc, and is with Inception; inception, features: one of them, see `extractors.open_extractor`; definition: whose IS,
    precision and recall, torch-fidelity's by default, adm's with per_class; kid_subset: pictures of KID's subsets;
    neighbours: "on", "off", or "auto": where the reference has 100,000 pictures at most; data: pictures whose
    reconstructions by SOURCE, a tokenizer, are measured; num: 50,000 by default, of files all; per_class: so many of
    each class instead; tokenizer to round: of a model, as of `tasks.sample`; batch: pictures computed together, by
    default what `out` was begun with, else 64; threads: CPU threads of a process, on which results depend; keep: a
    folder for the pictures; out: by default a folder in a run's `evaluated`, or beside SOURCE.
    Returns: what results.json holds, on the first rank; None on the others. Raises: UserError.
    """
    options = {name: value for name, value in locals().items() if name not in ("keep", "out")}
    options = scoring.settled(options)
    process.start(threads)
    job = scoring.open_job(options, _path(out), _path(keep))
    process.say(f"results: {job.out}")
    known = scored.known(job) if process.start().first and keep is None else None
    if process.broadcast_object(known is not None):
        return scored.said(known, job.out) if known else None
    return scored.run(job)


def replay(results, *, out=None) -> None:
    """The evaluation of a results.json anew, in `out` (a new folder beside it): UserError that names the first field
    that differs, figures last, which are to be equal to a millionth. Versions and machines may differ, and are said."""
    before = passport.read(Path(results))
    try:
        options = scoring.settled(before["options"])
        process.start(options["threads"])
        out = _path(out) or process.on_first(lambda: _unused(Path(results)))
        job = scoring.open_job(options, out, None)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{results}: is not whole ({error!r}); it cannot be replayed") from None
    if differs := passport.difference(before, job.facts):
        raise UserError(f"{results}: not reproduced, first difference in {differs}")
    process.say(f"results: {out}")
    now = scored.run(job)
    if now is None:
        return
    for change in passport.changes(before, now):
        process.say(f"- {change}")
    if differs := passport.different_figure(before, now):
        raise UserError(f"{results}: not reproduced, first difference in {differs}")
    process.say(f"{results}: reproduced, every figure to a millionth")


def make_reference(data, *, out=None, inception=None, features=None, size=256, batch=64, threads=1) -> None:
    """Statistics of a data set as an .npz: short side resized to `size` (bilinear, antialiased), centre crop, as the
    paper's protocol does; of train/ where there is one (`DATA:val`: the other). With rows of features, so that they
    also serve KID, precision and recall. By any number of processes; a killed one goes on."""
    if out is None or Path(out).suffix != ".npz" or Path(out).is_dir():
        given = "is missing" if out is None else out
        raise UserError(f"--out {given}: give the file that the statistics go to, such as stats.npz")
    me, out = process.start(threads), Path(out)
    extractor = extractors.open_extractor(inception, features)
    real = sources.open_source(Path(data), size, scoring.split_of(data))
    held = FeatureSet.begin(out.with_suffix(".features"), extracting.settings_of(real, extractor), real.n, batch)
    extracting.extract(held, real, extractor)
    if me.first:
        references.write_statistics(out, references.statistics_of(held))
        process.say(f"{out}: statistics of {real.n:,} pictures; their features in {held.folder} may be removed")


def _unused(results: Path) -> Path:
    """A folder beside it in which no replay has ended yet."""
    place = (results if results.is_dir() else results.parent) / "replayed"
    number = 1
    while (out := place if number == 1 else place.with_name(f"replayed-{number}")).joinpath("results.json").exists():
        number += 1
    return out


def _path(given) -> Path | None:
    return None if given is None else Path(given)
