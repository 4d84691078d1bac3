"""What a user sees when something is wrong: one line, and a meaningful exit code."""

EXIT_BUG = 1
EXIT_USER = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; starting again continues


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: the file, key or value, then the remedy.

    Shown without a traceback and with exit code 2; `MAGE_DS_DEBUG=1` shows the traceback.
    """


class Stopped(Exception):
    """The run was asked to stop, has saved its last completed step, and ends with exit code 75."""
