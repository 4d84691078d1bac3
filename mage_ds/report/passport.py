"""The passport of a score: everything that it depends on beside the figures, in results.json, and how two compare.

Sections: `source`, `reference`, `extractor`, `options` decide the figures; `machine`, `versions`, `code` may differ
where somebody else finds the same; `figures` hold the numbers.
"""

import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from mage_ds import files
from mage_ds.errors import UserError, brief
from mage_ds.report.tables import aligned

FORMAT = 1
IDENTITY = ("source", "reference", "extractor", "options")
_CIRCUMSTANCE = ("machine", "versions", "code")
_VERSIONS = ("mage_ds", "torch", "numpy", "deepspeed", "timm", "torch-fidelity", "pillow")
_VERSIONS += ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
_SEVERAL = {"looks": "a comparison of two (--versus)", "rows": "a sweep of several evaluations (--sweep)"}
_SAME = 1e-6  # relative difference of figures that are the same


def circumstances() -> dict:
    """Versions, the code's commit and the command line of this process."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    line = shlex.join(["mage-ds" if words[0] in ("__main__.py", "mage-ds") else words[0], *words[1:]])
    return {"versions": _versions(), "code": _commit(), "command": line}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> dict:
    """The commit that the package is checked out at, and whether files of it differ; empty where it is no checkout."""
    package = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        line = ["git", "-C", str(package), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:  # installed inside of somebody's checkout
            return {}
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("--no-optional-locks", "status", "--porcelain", "--", ".")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def write(folder: Path, results: Mapping, name: str = "results.json") -> Path:
    """results.json, or another `name`, in `folder`, whole or not at all. Numbers that are not finite become null."""
    path = Path(folder) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.saved(path) as file:
            file.write((json.dumps(_plain({"format": FORMAT, **results}), indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another folder with --out") from None
    return path


def other(before: Mapping, now: Mapping, exact: bool = False) -> str | None:
    """As `difference`, but for the metrics: figures of the same pictures stand in one file, whenever they were made."""
    both = ({**each, "options": {**_options(each), "metrics": None}} for each in (before, now))
    return difference(*both, exact=exact)


def _options(results: Mapping) -> Mapping:
    found = results.get("options")
    return found if isinstance(found, Mapping) else {}


def set_aside(folder: Path, now: Mapping) -> str | None:
    """Gives a results.json of something else than `now` another name, results-1.json, ...: a line that says so."""
    path = Path(folder) / "results.json"
    try:
        before = json.loads(path.read_text())
        differs = other(before, now) if isinstance(before, dict) else "no passport"
    except (OSError, ValueError, RecursionError):  # none, or nothing that anybody could use
        return None
    if differs is None:
        return None
    names = (path.with_name(f"results-{number}.json") for number in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    with suppress(OSError):  # then `write` says why
        os.rename(path, kept)
    return f"{path}: was of something else ({differs}), and is {kept.name} now"


NAMES = {"fid": "FID", "fid_infinity": "FID at n = infinity", "is": "Inception score", "kid": "KID"}


def table(results: Mapping) -> str:
    """The figures, beside the published ones where the recipe has them, and the remarks below."""
    published = results.get("published") or {}
    head = ["", "value", "interval", "n", *(["published (n = 50,000)"] if published else [])]
    lines = [head]
    for name, figure in results["figures"].items():
        low_high = figure.get("interval")
        interval = "-" if low_high is None else " to ".join(_number(each) for each in low_high)
        line = [NAMES.get(name, name), _number(figure["value"]), interval, f"{figure['n']:,}"]
        lines.append([*line, *([_number(published.get(name))] if published else [])])
    return "\n".join([aligned(lines), *notes(results), *(f"- {remark}" for remark in results.get("remarks", []))])


def notes(results: Mapping) -> list[str]:
    """Lines beneath figures: what their intervals are, and of which features they are made."""
    kinds = {figure["interval_is"]: [] for figure in results["figures"].values() if figure.get("interval_is")}
    for name, figure in results["figures"].items():
        if figure.get("interval_is"):
            kinds[figure["interval_is"]].append(NAMES.get(name, name))
    extractor = results["extractor"]
    return [
        *(f"(interval of {', '.join(names)}: {kind})" for kind, names in kinds.items()),
        f"(features: {extractor['name']}, {str(extractor['hash'])[:12]}; compare with figures of the same only)",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def read(path: Path) -> dict:
    """A results.json of `write`. UserError where it is none."""
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        results = json.loads(path.read_text())
        if several := next((what for name, what in _SEVERAL.items() if name in results), None):
            raise UserError(f"{path}: is {several}; name the results.json of one evaluation, such as those beneath it")
        if results["format"] != FORMAT or not all(isinstance(results[name], dict) for name in (*IDENTITY, "figures")):
            raise ValueError(f"format {results['format']}, not {FORMAT}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the results.json of a `mage-ds evaluate --metrics fid`") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: is no passport of a score ({brief(repr(error))}); name a results.json of `evaluate`"
        ) from None
    return results


def difference(before: Mapping, now: Mapping, sections=IDENTITY, exact: bool = False) -> str | None:
    """The first field of these sections that differs, as words; None: all are the same. Fields that one does not have
    (it was written by another version) differ too. exact: the times of files count, which a copy has others of."""
    then, here = (dict(_leaves({name: each.get(name) for name in sections})) for each in (before, _plain(now)))
    for key in [*then, *(key for key in here if key not in then)]:
        if key.endswith(".files") and not exact:
            continue
        if then.get(key) != here.get(key):
            return f"{key}: {brief(then.get(key))} then, {brief(here.get(key))} now"
    return None


def changes(before: Mapping, now: Mapping) -> list[str]:
    """What differs in the circumstances, one remark each."""
    found = [(name, difference(before, now, (name,))) for name in _CIRCUMSTANCE]
    return [text for _, text in found if text]


def different_figure(before: Mapping, now: Mapping) -> str | None:
    """The first figure, interval included, that differs by more than a relative 1e-6, as words."""
    then, here = (dict(_leaves({"figures": each["figures"]})) for each in (before, _plain(now)))
    for key, value in then.items():
        other = here.get(key)
        if isinstance(value, float | int) and isinstance(other, float | int):
            if not math.isclose(value, other, rel_tol=_SAME, abs_tol=1e-12):
                return f"{key}: {value!r} then, {other!r} now"
        elif value != other:
            return f"{key}: {brief(value)} then, {brief(other)} now"
    return None


def _leaves(value, key: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key -> value; list items have their number."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{i}")
    else:
        yield key, value


def _plain(value):
    """As JSON gives it back: numpy's numbers, paths and tuples are gone, what is not finite is None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
