"""For tests: processes that extract features, each to be killed alone (see forked.py)."""

from forked import Forked, serve


class Extracting(Forked):
    def __init__(self):
        super().__init__(__file__)

    def start(self, folder, source, network, n: int, batch: int, log, kill_at: int = 0) -> int:
        """Features of `source` into `folder`, below which changes count; the others as of `Forked.order`."""
        made = {"folder": folder, "source": source, "network": network, "n": n, "batch": batch}
        return self.order(**made, below=folder, log=log, kill_at=kill_at)


def _work(order: dict) -> int:
    from mage_ds.engine import extracting, process
    from mage_ds.engine.extractors import open_extractor
    from mage_ds.engine.sources import open_source
    from mage_ds.errors import UserError
    from mage_ds.evaluation.feature_set import FeatureSet

    try:
        process.start(threads=1)
        source, extractor = open_source(order["source"]), open_extractor(features=f"run:{order['network']}")
        settings = extracting.settings_of(source, extractor)
        extracting.extract(FeatureSet.begin(order["folder"], settings, order["n"], order["batch"]), source, extractor)
        return 0
    except UserError as error:
        print(f"error: {error}")
        return 2


if __name__ == "__main__":
    import deepspeed  # noqa: F401

    import mage_ds.engine.extracting  # noqa: F401

    serve(_work)
