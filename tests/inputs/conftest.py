"""The data set that most tests of inputs read."""

import pytest
from made_pictures import picture


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """23 pictures of different sizes in three classes."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(23):
        path = root / f"class{i % 3}" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture(i, 24 + 3 * i, 60 - i).save(path, quality=95)
    return root
