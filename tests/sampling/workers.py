"""For tests: processes of `mage-ds`, each to be killed alone (see forked.py)."""

from pathlib import Path

from forked import Forked, serve


class Workers(Forked):
    def __init__(self):
        super().__init__(__file__)

    def start(self, *argv, log: Path, below: Path, kill_at: int | str = 0, shard: int = 12) -> int:
        """`mage-ds argv`; shard: about so many pictures are in a tar; the others as of `Forked.order`."""
        return self.order(argv=[str(word) for word in argv], log=log, kill_at=kill_at, below=below, shard=shard)


def _work(order: dict) -> int:
    from mage_ds.cli import main
    from mage_ds.report import pictures

    pictures._SHARD = order["shard"]
    return main(order["argv"])


if __name__ == "__main__":
    import deepspeed  # noqa: F401

    import mage_ds.cli
    import mage_ds.tasks.sample  # noqa: F401

    serve(_work)
