"""What a user sees when something is wrong: one line, and a meaningful exit code."""

import json
from collections.abc import Callable, Container

EXIT_BUG = 1
EXIT_USER = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; starting again continues


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: the file, key or value, then the remedy.

    Shown without a traceback and with exit code 2; `MAGE_DS_DEBUG=1` shows the traceback.
    """


def brief(value) -> str:
    """Of a setting, for a line: hashes are cut, which differ at once or not at all, and so is what is long."""
    text = json.dumps(value) if isinstance(value, dict | list) else "none" if value is None else str(value)
    if len(text) == 64 and text.isalnum():
        return text[:12]
    return text if len(text) <= 100 else text[:97] + "..."


def refuse_differences(
    out,
    what: str,
    before: dict,
    settings: dict,
    brief: Callable[[object], str] = brief,
    free: Container[str] = (),
    how: str = "holds",
) -> None:
    """UserError that names every setting, but those in `free`, in which a folder's content was made otherwise.

    what: that content, in the plural; before, settings: then and now; brief: a value as the line shows it; how: what
    the folder does with that content.
    """
    keys = [key for key in settings if key not in free and before.get(key) != settings[key]]
    if keys:
        said = "; ".join(f"{key} {brief(before.get(key))} there, {brief(settings[key])} here" for key in keys)
        raise UserError(f"--out {out}: {how} {what} of other settings ({said}); choose another folder")


class Stopped(Exception):
    """The run was asked to stop, has saved its last completed step, and ends with exit code 75."""
