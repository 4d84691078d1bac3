"""For tests: files of random values in the layout of weights that cannot be shipped."""

import pytest
import torch


def inception(path):
    """Inception v3 as torch-fidelity publishes it: 94 convolutions with batch norm, and the last layer."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    with pytest.MonkeyPatch.context() as patch:  # it would be downloaded, and then loaded
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        weights = fidelity.FeatureExtractorInceptionV3("x", ["2048"]).state_dict()
    torch.save(weights, path)
    return weights


def vgg(path):
    """The convolutions of VGG-16 as torchvision publishes it."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    torch.save({f"features.{name}": value for name, value in vgg16().features.state_dict().items()}, path)
