"""LPIPS from its published files against the package `lpips`; VGG-16's weights are random, in torchvision's layout."""

import sys
import warnings

import pytest
import torch

from mage_ds.errors import UserError
from mage_ds.interop import lpips as ours


@pytest.fixture(scope="module")
def reference():
    """The package's own model with random VGG-16 weights, and its published linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision's deprecated arguments
        theirs = pytest.importorskip("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for name, parameter in theirs.net.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.1)
    return theirs


@pytest.fixture(scope="module")
def vgg(reference, tmp_path_factory):
    """A file as torchvision's: `features.N` and the classifier, which LPIPS has no use for."""
    weights = {f"features.{name.split('.', 1)[1]}": value for name, value in reference.net.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    torch.save({**weights, "classifier.0.weight": torch.zeros(3, 2)}, path)
    return path


def test_equals_the_package(reference, vgg):
    model = ours.load_lpips(str(vgg))
    generator = torch.Generator().manual_seed(0)
    for side in (32, 50):
        x, y = (torch.rand(2, 3, side, side, generator=generator) for _ in range(2))
        y = 0.7 * x + 0.3 * y
        with torch.no_grad():
            expected = reference(x, y, normalize=True).flatten()
        torch.testing.assert_close(model(x, y), expected, rtol=1e-5, atol=1e-7)
    x.requires_grad_()
    (found,) = torch.autograd.grad(model(x, y).sum(), x)
    (expected,) = torch.autograd.grad(reference(x, y, normalize=True).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_cache_of_torchvision_is_found(vgg, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=r"no such file; LPIPS needs VGG-16.*fetch it with.*loss\.perceptual=0"
    ) as error:
        ours.load_lpips()
    cached = tmp_path / "hub" / "checkpoints" / vgg.name
    assert str(cached) in str(error.value) and "\n" not in str(error.value)
    cached.parent.mkdir(parents=True)
    cached.symlink_to(vgg)
    assert ours.load_lpips().features[0].weight.std() > 0


def test_the_package_is_not_imported(vgg):
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "lpips"}
    try:
        ours.load_lpips(str(vgg))
        assert "lpips" not in sys.modules
    finally:
        sys.modules.update(kept)


def test_without_the_package(vgg, monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lpips, or do without LPIPS"):
        ours.load_lpips(str(vgg))


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_another_models_file(vgg, tmp_path, change):
    weights = torch.load(vgg, weights_only=True)
    if change == "missing":
        del weights["features.28.bias"]
    else:
        weights["features.28.bias"] = torch.zeros(3)
    path = tmp_path / "other.pth"
    torch.save(weights, path)
    with pytest.raises(UserError, match=r"other\.pth: is not torchvision's VGG-16 \(features\.28\.bias is"):
        ours.load_lpips(str(path))


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Evil()}, "vgg.pth")
    with pytest.raises(UserError, match=r"vgg\.pth"):
        ours.load_lpips("vgg.pth")
    assert not (tmp_path / "evil").exists()


def test_a_file_that_is_cut_off(vgg, tmp_path):
    path = tmp_path / "cut.pth"
    path.write_bytes(vgg.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.pth"):
        ours.load_lpips(str(path))
