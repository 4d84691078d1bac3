"""policy.py against timm's own input pipeline in a plain loop, and that its processes end, however the work ends."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from made_pictures import recipe, take
from PIL import Image

from mage_ds import keyed
from mage_ds.errors import UserError
from mage_ds.inputs import dali, policy
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.quarantine import Quarantine

NAME = "rand-m9-mstd0.5-inc1"
SIZE = 32


def inputs(**more):
    return recipe(SIZE, interpolation="cubic", policy=NAME, **more)


@pytest.fixture
def count(monkeypatch):
    """Sets how many workers a stream has."""
    return lambda number: monkeypatch.setattr(policy, "workers", lambda: number)


def workers():
    children = psutil.Process().children(recursive=True)
    return [child for child in children if policy.__name__ in child.cmdline()]


def ended(pids, timeout=20.0):
    deadline = time.monotonic() + timeout
    while living := [pid for pid in pids if psutil.pid_exists(pid)]:
        if time.monotonic() > deadline:
            return not [pid for pid in living if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.05)
    return True


def pixels(batches):
    every = (zip(b.epoch.tolist(), b.index.tolist(), b.images, strict=True) for b in batches)
    return {(epoch, i): images for epoch, i, images in itertools.chain(*every)}


# --- pictures


def test_pictures_are_timms_on_any_workers_and_ranks(folder, count):
    """A plain loop over timm's own pipeline, one worker, and a resume in mid-epoch on two ranks of two and of one."""
    from timm.data import create_transform

    _, theirs, _ = create_transform(SIZE, True, auto_augment=NAME, interpolation="bicubic", separate=True)
    catalog = open_catalog(folder)
    plain = pixels(take(catalog, 4, inputs=recipe(SIZE, interpolation="cubic"), views=2))
    count(1)
    one = pixels(take(catalog, 4, inputs=inputs(), views=2))
    assert one.keys() == plain.keys() and len(one) == 32
    changed = 0
    for (epoch, i), images in one.items():
        for view in range(2):
            seed = keyed.seed_of(4, f"policy/{view}", epoch, i)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            before = plain[epoch, i][view]
            want = torch.from_numpy(np.array(theirs(Image.fromarray(before.permute(1, 2, 0).numpy())))).permute(2, 0, 1)
            assert torch.equal(images[view], want)
            changed += not torch.equal(before, want)
    random.seed(1)
    np.random.seed(1)
    mine = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    assert 32 < changed < 64  # each of two operations is done with probability 1/2

    for rank, number in ((0, 2), (1, 1)):
        count(number)
        part = pixels(take(catalog, 2, position=12, batch=10, rank=rank, world=2, inputs=inputs(), views=2))
        assert len(part) == 10 and all(torch.equal(images, one[key]) for key, images in part.items())
    assert random.random() == mine[0] and np.random.rand() == mine[1]  # the training's own numbers are left alone


def test_every_operation_bears_every_magnitude():
    """timm's increasing posterize keeps no bit at magnitude 10, which one picture in thousands has."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    for name in ("rand-m{}-p1-inc1", "rand-m{}-p1"):
        for magnitude in range(11):
            for operation in policy.transform(name.format(magnitude), SIZE, "cubic").ops:
                done = np.array(operation(image))
                assert done.shape == (SIZE, SIZE, 3) and done.dtype == np.uint8
                if operation.name == "PosterizeIncreasing":  # as Pillow did it: the highest bits stay
                    keep = 4 - int(magnitude / 10 * 4)
                    assert (done == np.array(image).astype(int) // 2 ** (8 - keep) * 2 ** (8 - keep)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_pictures_go_back_to_the_gpu(folder, count):
    count(2)
    catalog, timm = open_catalog(folder), policy.transform(NAME, SIZE, "cubic")
    plain = pixels(take(catalog, 2, inputs=recipe(SIZE, interpolation="cubic"), device="cuda"))
    for (epoch, i), images in pixels(take(catalog, 2, inputs=inputs(), device="cuda")).items():
        seed = policy.seeds_of(4, np.array([epoch]), np.array([i]), 1)
        want = policy._work(timm, plain[epoch, i].cpu().numpy(), seed)
        assert images.is_cuda and (images.cpu().numpy() == want).all()


# --- processes


def stream(folder):
    catalog = open_catalog(folder)
    numbers = {"seed": 0, "position": 0, "batch": 4, "micro_batch": 4, "rank": 0, "world": 1}
    quarantine = Quarantine(None, 0.0, catalog.n)
    return dali.stream(catalog, **numbers, inputs=inputs(), device="cpu", quarantine=quarantine)


def test_workers_end_with_the_stream_and_one_that_is_killed_ends_it(folder, count):
    count(1)
    opened = stream(folder)
    next(opened)
    pids = [worker.pid for worker in workers()]
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(UserError, match=r"a worker of inputs\.policy was ended by SIGKILL") as error:
        for _ in range(50):
            next(opened)
    assert "\n" not in str(error.value)
    with pytest.raises(StopIteration):
        next(opened)
    assert ended(pids) and not workers()

    opened = stream(folder)
    while not workers():
        time.sleep(0.01)
    opened.close()  # while they start
    assert not workers()


def test_a_workers_exception_keeps_its_traceback(folder, count, monkeypatch):
    count(1)
    monkeypatch.setattr(policy, "seeds_of", lambda *arguments: ["no number"] * 4)
    opened = stream(folder)
    with pytest.raises(RuntimeError, match=r"inputs\.policy failed in its worker:\n(?s:.*)Error"):
        next(opened)
    assert ended([worker.pid for worker in workers()])


@pytest.mark.processes
@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_workers_end_with_a_parent_that_is_killed(folder, end):
    code = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_policy
test_policy.policy.workers = lambda: 2
opened = test_policy.stream({str(folder)!r})
next(opened)
print(*(worker.pid for worker in test_policy.workers()), flush=True)
time.sleep(100)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, process_group=0
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        if end == signal.SIGINT:
            os.killpg(parent.pid, signal.SIGINT)  # as the terminal does: workers go on for as long as the training
        else:
            parent.kill()
        parent.wait(timeout=60)
    assert len(pids) == 2 and ended(pids)
