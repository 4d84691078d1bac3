"""Features beside other people's code: torch-fidelity's Inception, timm with torchvision's preparation, our API."""

import made_export
import numpy as np
import pytest
import random_weights
import timm
import torch
from PIL import Image
from torchvision import transforms

import mage_ds
from mage_ds.engine import process, stored
from mage_ds.engine.extractors import open_extractor
from mage_ds.errors import UserError
from mage_ds.evaluation.features import fitted

B = 3
NET = "test_resnet.r160_in1k"  # timm's smallest


def images(height, width, b=B):
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)) for _ in range(b)]
    return np.stack([np.asarray(each.resize((width, height), Image.Resampling.BICUBIC)) for each in coarse])


def called(extractor, pixels):
    features, logits = extractor.call(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert features.dtype == torch.float32 and features.shape == (len(pixels), extractor.width)
    assert not features.requires_grad and (logits is None) == (extractor.logits is None)
    return features, logits


@pytest.fixture(scope="module", autouse=True)
def one_process():
    process.start()


def test_inception_is_torch_fidelitys(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path, draw = tmp_path / "inception.pth", torch.Generator().manual_seed(0)
    weights = random_weights.inception(path)
    for name, value in weights.items():  # as they come, features would be of 1e-7, whatever the picture
        if ".bn." in name and value.ndim:
            low, high = {"weight": (1.6, 2.4), "running_var": (0.5, 1.5)}.get(name.rpartition(".")[2], (-0.2, 0.2))
            value.uniform_(low, high, generator=draw)
    torch.save(weights, path)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    ours = open_extractor(inception=path)
    assert (ours.name, ours.width, ours.logits) == ("inception", 2048, 1008)
    assert ours.hash == stored.weights_hash(weights)
    pixels = images(40, 56)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
    for mine, other in zip(called(ours, pixels), expected, strict=True):
        assert (mine - other).abs().max() <= 2e-6 < 1e-3 < (other[0] - other[1]).abs().max() < 1


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network of timm with random values, and its file."""
    torch.manual_seed(0)
    model = timm.create_model(NET).eval()
    path = tmp_path_factory.mktemp("timm") / "net.pth"
    torch.save(model.state_dict(), path)
    return model, path


def test_timm_as_its_own_evaluation(network):
    model, path = network
    extractor = open_extractor(features=f"timm:{NET}:{path}")
    assert (extractor.name, extractor.logits) == (f"timm:{NET}", None)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for height, width in ((40, 56), (200, 170)):
        pixels = images(height, width)
        with torch.no_grad():
            x = torch.stack([prepare(Image.fromarray(each)) for each in pixels])
            expected = model.forward_head(model.forward_features(x), pre_logits=True)
        features, _ = called(extractor, pixels)
        # A level here and there is rounded otherwise than Pillow does.
        assert (features - expected).abs().max() < 0.02 * expected.abs().max()
        assert torch.nn.functional.cosine_similarity(features, expected).min() > 0.9999


def test_files_of_trainings_and_other_class_numbers(network, tmp_path):
    model, path = network
    plain = open_extractor(features=f"timm:{NET}:{path}")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, tmp_path / "a.pth"
    )
    assert open_extractor(features=f"timm:{NET}:{tmp_path / 'a.pth'}").hash == plain.hash
    fine = timm.create_model(NET, num_classes=7)
    torch.save(fine.state_dict(), tmp_path / "b.pth")
    assert called(open_extractor(features=f"timm:{NET}:{tmp_path / 'b.pth'}"), images(20, 20))[0].isfinite().all()


def test_our_own_features_are_those_of_the_python_api(tmp_path):
    export = made_export.make_export(tmp_path / "model", classes=3)
    extractor, model = open_extractor(features=f"run:{export}"), mage_ds.from_pretrained(export, device="cpu")
    assert extractor.name == "run:model" and extractor.width == 32
    pixels = images(made_export.SIDE, made_export.SIDE)
    features, _ = called(extractor, pixels)
    assert torch.allclose(features, model.features(pixels, batch=B), atol=1e-5)
    larger = images(50, 70)
    resize = transforms.Compose([transforms.Resize(made_export.SIDE), transforms.CenterCrop(made_export.SIDE)])
    small = np.stack([np.asarray(resize(Image.fromarray(each))) for each in larger])
    seen = fitted(torch.from_numpy(larger).permute(0, 3, 1, 2), made_export.SIDE, short=made_export.SIDE)
    assert np.abs(seen.permute(0, 2, 3, 1).numpy() - small).max() <= 1
    assert called(extractor, larger)[0].isfinite().all()
    other = made_export.make_export(tmp_path / "other", classes=2)
    assert open_extractor(features=f"run:{other}").hash != extractor.hash
    assert open_extractor(features=f"run:{export}").hash == extractor.hash


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("short", [20, 16, None])
def test_fitted_is_pillows_but_for_rounding(mode, short):
    kind = transforms.InterpolationMode(mode)
    for height, width in ((31, 40), (90, 33), (16, 16)):
        pixels = images(height, width)
        first = transforms.Resize((16, 16) if short is None else short, kind)
        plain = transforms.Compose([first, transforms.CenterCrop(16)])
        expected = np.stack([np.asarray(plain(Image.fromarray(each))) for each in pixels])
        found = fitted(torch.from_numpy(pixels).permute(0, 3, 1, 2), 16, short=short, interpolation=mode)
        assert (found == found.round()).all() and found.shape == (B, 3, 16, 16)
        apart = np.abs(found.permute(0, 2, 3, 1).numpy() - expected)
        assert apart.max() <= 2 and apart.mean() < 0.3  # Pillow rounds, and cuts off, between the two axes


def bad(tmp_path):
    tokenizer_less = made_export.make_export(tmp_path / "bare", tokenizer=False)
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "foreign.pth")
    (tmp_path / "text.pth").write_text("no weights")
    return {
        (): "give either --inception FILE or --features",
        ("features", "resnet50"): "must be timm:NAME, timm:NAME:FILE, mae:FILE or run:PATH",
        ("features", "run:"): "must be timm:NAME",
        ("features", "timm:resnet5O"): "no such model; did you mean resnet50",
        ("features", f"timm:{NET}"): "are not in timm's cache; copy that file here",
        ("features", f"timm:{NET}:{tmp_path / 'missing.pth'}"): "missing.pth",
        ("features", f"timm:{NET}:{tmp_path / 'text.pth'}"): "is no file of a model",
        ("features", f"timm:{NET}:{tmp_path / 'foreign.pth'}"): "does not hold the weights of timm's",
        ("features", f"run:{tmp_path / 'nothing'}"): "no such run folder",
        ("features", f"run:{tokenizer_less}"): "comes without a tokenizer",
        ("features", f"run:{tmp_path / 'tokenizer'}"): "is a tokenizer",
        ("inception", tmp_path / "foreign.pth"): "Inception's weights are",
    }


def test_what_is_no_extractor_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    made_export.make_export(tmp_path / "whole")
    numbers = {"channels": 32, "multipliers": [1, 1, 1], "blocks": 1, "code_dim": 8, "codes": 64}
    stored.save_tokenizer(tmp_path / "tokenizer", stored.load_tokenizer(tmp_path / "whole")[0], numbers, 32)
    for given, said in bad(tmp_path).items():
        with pytest.raises(UserError) as caught:
            open_extractor(**dict([given] if given else []))
        message = str(caught.value)
        assert said in message and message.isprintable(), message
