"""order.py against a stream written out epoch by epoch."""

import numpy as np

from mage_ds import keyed
from mage_ds.inputs.order import sample_at


def test_stream_is_the_epochs_in_a_row():
    n, seed = 7, 3
    plain = [(epoch, int(i)) for epoch in range(4) for i in keyed.permutation(seed, "order", epoch, n)]
    epoch, index = sample_at(np.arange(4 * n), n, seed)
    assert list(zip(epoch.tolist(), index.tolist(), strict=True)) == plain
    assert epoch.dtype == index.dtype == np.int64


def test_every_epoch_holds_every_sample_once_in_another_order():
    n = 50
    _, index = sample_at(np.arange(3 * n), n, 0)
    epochs = index.reshape(3, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    for a, b in ((0, 1), (1, 2)):
        assert abs(np.corrcoef(epochs[a], epochs[b])[0, 1]) < 0.5  # DALI's own shuffling: 0.99


def test_any_order_of_asking_gives_the_same():
    n, seed = 11, 5
    _, straight = sample_at(np.arange(110), n, seed)
    for k in (109, 0, 55, 54, 12, 109):
        assert sample_at(k, n, seed)[1][0] == straight[k]
    shuffled = np.random.default_rng(0).permutation(110)
    assert (sample_at(shuffled, n, seed)[1] == straight[shuffled]).all()


def test_seeds_differ():
    assert (sample_at(np.arange(100), 100, 0)[1] != sample_at(np.arange(100), 100, 1)[1]).any()
