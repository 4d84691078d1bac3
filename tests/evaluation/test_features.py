"""Inception's file: random weights in its layout run as torch-fidelity runs them; everything else is one line."""

import pickle

import numpy as np
import pytest
import random_weights
import torch

from mage_ds.errors import UserError
from mage_ds.evaluation import features


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("inception") / features.FILE


@pytest.fixture(scope="module")
def weights(file):
    found = random_weights.inception(file)
    assert len(found) == 566 and found["fc.weight"].shape == (1008, 2048)
    assert found["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    return found


def test_features_and_logits(file, weights):
    model = features.load_inception(file)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 40, 56), dtype=np.uint8))
    with torch.no_grad():
        vectors, logits = model(images)
        again, _ = model.to(memory_format=torch.channels_last)(images)
    assert vectors.shape == (2, features.WIDTH) and logits.shape == (2, 1008) and vectors.dtype == torch.float32
    scale = vectors.abs().max()  # random weights make small features
    plain = vectors @ weights["fc.weight"].T  # without the bias
    assert (logits - plain).abs().max() < 1e-5 * plain.abs().max()
    assert (vectors - again).abs().max() < 1e-5 * scale < 1e-3 * (vectors[0] - vectors[1]).abs().max()


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


BAD = {
    "missing file": (None, "No such file"),
    "text": (b"not a file of weights", "does not open"),
    "empty": (b"", "does not open"),
    "a list": ([torch.zeros(1)], "no flat dict"),
    "nested": ({"state_dict": {"fc.weight": torch.zeros(1)}}, "no flat dict"),
    "names that are none": ({1: torch.zeros(1)}, "no flat dict"),
    "another model": ({"fc.weight": torch.zeros(1000, 2048)}, "holds 1 tensors and fc.weight of (1000, 2048)"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused_in_one_line(name, tmp_path):
    content, said = BAD[name]
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    refused(path, said)


def test_a_key_that_differs_is_named(weights, tmp_path):
    changed = without(weights, "Mixed_5b.branch1x1.conv.weight") | {"other": torch.zeros(1)}
    torch.save(changed, tmp_path / "file.pth")
    refused(tmp_path / "file.pth", "Mixed_5b.branch1x1.conv.weight")


def test_names_are_shown_printable(weights, tmp_path):
    torch.save(without(weights, "fc.bias") | {"x\ny\x1b[2J": torch.zeros(1)}, tmp_path / "file.pth")
    refused(tmp_path / "file.pth", "fc.bias")


def test_the_file_itself_is_never_unpickled(file, weights, monkeypatch):
    load, seen = torch.load, []

    def watched(source, *args, **kwargs):
        seen.append((source == file, kwargs["weights_only"]))
        return load(source, *args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    features.load_inception(file)
    assert seen == [(True, True), (False, False)]


def test_a_truncated_file(weights, file, tmp_path):
    (tmp_path / "file.pth").write_bytes(file.read_bytes()[:100_000])
    refused(tmp_path / "file.pth", "does not open")


def test_nothing_is_executed(weights, tmp_path, capsys):
    torch.save(without(weights, "fc.bias") | {"fc.bias": Bomb()}, tmp_path / "file.pth")
    refused(tmp_path / "file.pth", "does not open")
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path / "file.pkl", "does not open")
    assert "executed" not in capsys.readouterr().out


def refused(path, said):
    with pytest.raises(UserError) as caught:
        features.load_inception(path)
    message = str(caught.value)
    assert said in message and features.FILE in message and message.isprintable()
