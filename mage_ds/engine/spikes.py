"""The rule for losses that leap: what a spike is, and how often a run may go back because of one."""

import math
import statistics
from collections import deque

from mage_ds.recipes.sections import Spike

MOST_REWINDS = 3  # in a row, none of which led to a checkpoint beyond the spike


class Rule:
    """Follows the losses of a run. `rewinds`: how often it went back since a checkpoint was saved beyond `last`, the
    furthest step of a spike. All of it is in a checkpoint, so that a continued run judges as one left alone."""

    def __init__(self, recipe: Spike):
        self.action, self.factor, self.window = recipe.action, recipe.factor, recipe.window
        self.rewinds = self.last = 0
        self._losses = deque(maxlen=recipe.window)

    def median(self, loss: float) -> float | None:
        """The median before this step, where the step's loss is a spike; else None, and the loss is taken in.

        A loss that is not finite is neither: its step has been skipped.
        """
        if not math.isfinite(loss):
            return None
        if len(self._losses) == self.window:
            median = statistics.median(self._losses)
            if loss > self.factor * median:
                return median
        self._losses.append(loss)
        return None

    def saved(self, step: int) -> None:
        """A checkpoint of this step is about to be written: beyond the last spike it is progress."""
        if step > self.last:
            self.rewinds = 0

    def facts(self) -> dict:
        return {"losses": list(self._losses), "rewinds": self.rewinds, "last": self.last}

    def restore(self, facts: dict | None) -> None:
        """What `facts` said; None: the checkpoint was saved without the rule, which begins anew."""
        facts = facts or {"losses": [], "rewinds": 0, "last": 0}
        self._losses = deque(facts["losses"], maxlen=self.window)
        self.rewinds, self.last = facts["rewinds"], facts["last"]
