"""The writing thread: in order, few ahead, errors told; and what is said of who waited."""

import pytest

from mage_ds.errors import UserError
from mage_ds.report import writer as module
from mage_ds.report.writer import Writer


def test_an_error_of_the_writer_ends_the_work():
    written = []

    def write(number, apply):
        if number == 2:
            raise UserError("the disk is full")
        written.append((number, list(apply(abs, [-number]))))

    with pytest.raises(UserError, match="disk is full"), Writer(write) as writer:
        for number in range(9):
            writer.put(number)
    assert written[:2] == [(0, [0]), (1, [1])] and len(written) < 7
    with Writer(write) as writer:
        writer.put(1)
        writer.flush()
        assert written[-1] == (1, [1])


def test_shares_are_of_the_time_in_which_pictures_were_drawn(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def write(seconds, apply):
        now[0] += seconds

    with Writer(write) as writer:
        assert writer.summary(0, 100) == "0 pictures in 1m40s"
        writer._timed((3,))  # of 10 seconds of drawing; of 100 in all the others went by with loading and joining
        writer.drawing = 10
        line = writer.summary(20, 100)
    assert line == (
        "20 pictures in 1m40s; drawing took 10s, 2 pictures/s, in which the device waited 0.0% for writing, writing "
        "70.0% for the device"
    )
