"""Small pictures with tokenizers and a recipe, and their tokens, made once a session."""

import made_classifiers
import made_tokens
import pytest


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return made_tokens.make(tmp_path_factory.mktemp("tokenize"))


@pytest.fixture(scope="session")
def strong(place, tmp_path_factory):
    """Three strong views."""
    return made_tokens.tokenize(place, tmp_path_factory.mktemp("strong") / "t", views=3, augmentation="strong")


@pytest.fixture(scope="session")
def plain(place, tmp_path_factory):
    return made_tokens.tokenize(place, tmp_path_factory.mktemp("plain") / "t")


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory):
    """Small pictures of other kinds, and classifiers of them."""
    with made_classifiers.made(tmp_path_factory.mktemp("classify")) as made:
        yield made
