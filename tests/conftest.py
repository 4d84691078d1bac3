"""What every test has: one thread (the machines of tests are small, and float results depend on the count)."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch; child processes inherit it

import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(data, tokenizer): prepared digits and a tokenizer of a few steps, made by the command line once a session."""
    from launched import make_data_and_tokenizer

    return make_data_and_tokenizer(tmp_path_factory.mktemp("made"))
