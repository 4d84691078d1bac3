"""The facts of one or several hosts (see findings.py) as a table with a column for each."""

from collections import Counter

_WIDEST = 40  # characters of a cell


def _text(value) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)


def _limit(name: str, unit: int = 1, called: str = ""):
    def limit(each):
        value = each["limits"][name]
        return "unlimited" if value is None else f"{value // unit:,}{called}"

    return limit


def _installed(*names: str):
    def first(each):
        return next((each["installed"][name] for name in names if name in each["installed"]), None)

    return first


def _gpu_names(each: dict) -> str:
    kinds = Counter(f"{gpu['name']} {gpu['gib']:g} GiB" for gpu in each["gpus"])
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"


_ROWS = (  # title, check, what of its value
    ("python", "packages", lambda x: x["python"]),
    ("torch", "gpus", lambda x: x["torch"]),
    ("CUDA", "gpus", lambda x: x["cuda"]),
    ("NCCL", "gpus", lambda x: x["nccl"]),
    ("driver", "gpus", lambda x: x["nvidia_smi"][0]["driver"] if x["nvidia_smi"] else None),
    ("deepspeed", "packages", _installed("deepspeed")),
    ("DALI", "packages", _installed("nvidia-dali-cuda130", "nvidia-dali-cuda120")),
    ("timm", "packages", _installed("timm")),
    ("mage_ds", "packages", lambda x: f"{x['mage_ds']} ({x['files']})"),
    ("GPUs", "gpus", _gpu_names),
    ("cores", "system", lambda x: x["cores"]),
    ("memory", "system", lambda x: f"{x['memory']} GiB, {x['available']} free"),
    ("/dev/shm", "system", lambda x: f"{x['shm']:.3g} GiB, {x['shm_free']:.3g} free"),
    ("open files", "system", _limit("open_files")),
    ("locked memory", "system", _limit("locked_memory", 2**20, " MiB")),
    ("processes", "system", _limit("processes")),
    ("compiler", "build", lambda x: x["compiler"]),
    ("ninja", "build", lambda x: x["ninja"]),
    ("ops to build", "ops", lambda x: f"{len(x['fit'])} of {x['all']} possible"),
    ("clock", "clock", lambda x: f"{x['offset']:+.3f} s (within {x['within']:.3f})"),
    ("shared: sees", "shared", lambda x: "all" if not x["missing"] else f"not {', '.join(x['missing'])}"),
    ("shared: speed", "disk", lambda x: f"{x['write']:,.0f} MB/s in, {x['read']:,.0f} out"),
    ("shared: free", "disk", lambda x: f"{x['free']:,} GiB"),
    ("data", "listing", lambda x: f"{x['n']:,} pictures"),
    ("decoding", "decode", lambda x: f"{x['rate']:,.0f} pictures/s ({x['device']})"),
)
_MEASURED = ("memory", "/dev/shm", "clock", "shared: speed", "shared: free", "decoding")  # differ as a matter of course


def table(facts: dict, width: int, slots: dict | None = None) -> list[str]:
    """One column a host, in blocks of as many hosts as fit; `*` marks a row in which hosts differ."""
    asked = [row for row in _ROWS if any(row[1] in each for each in facts.values())]
    rows = [(title, [_cell(each, check, show) for each in facts.values()]) for title, check, show in asked]
    if slots:
        rows.append(("slots", [_text(slots[host]) for host in facts]))
    widest = [max(len(cell) for cell in cells) for cells in zip([*facts], *(cells for _, cells in rows), strict=True)]
    lines, first, hosts = [], 0, list(facts)
    while first < len(hosts):
        last = first + 1
        while last < len(hosts) and 16 + sum(w + 2 for w in widest[first : last + 1]) <= width:
            last += 1
        for title, cells in (("", hosts), *rows):
            differs = title and title not in _MEASURED and len(set(cells) - {"", "?"}) > 1
            columns = (f"{cell:{w}}" for cell, w in zip(cells[first:last], widest[first:last], strict=True))
            lines.append(f"{title:13} {'*' if differs else ' '} {'  '.join(columns)}".rstrip())
        lines.append("")
        first = last
    return lines


def _cell(answers: dict, check: str, show) -> str:
    """Empty: not asked; `?`: no answer."""
    if "unreachable" in answers or "error" in answers.get(check, {}):
        return "?"
    if check not in answers:
        return ""
    try:
        text = _text(show(answers[check]))
    except (KeyError, TypeError, IndexError):  # of another version of the package
        return "?"
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."
