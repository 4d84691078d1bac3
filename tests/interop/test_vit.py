"""MAE's checkpoints of the published layouts, with random values, beside timm's own ViT of these weights."""

from pathlib import Path

import pytest
import timm
import torch
from made_mae import PATCH, SIDE, WIDTH, encoder_table, features, normalized, of_timm, save

import mage_ds
from mage_ds.engine import process, stored
from mage_ds.engine.extractors import open_extractor
from mage_ds.errors import UserError
from mage_ds.interop import vit


def pictures() -> torch.Tensor:
    return torch.rand(3, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("decoder", [False, True])
def test_a_pre_training_file_gives_the_normalized_mean_of_the_last_block(tmp_path, decoder):
    path = tmp_path / "mae_visualize_vit.pth"
    model = save(path, gan=decoder)
    opened = stored.open_model(path)
    assert (opened.kind, opened.classifier, opened.tokenizer, opened.image_size) == ("encoder", None, None, 32)
    assert ("decoder_embed.weight" in opened.unused) == decoder
    assert "norm.weight" in opened.unused
    with torch.no_grad():
        torch.testing.assert_close(
            opened.encoder.features(pictures()), features(model, pictures()), rtol=1e-5, atol=1e-5
        )


def test_a_fine_tuned_file_gives_timms_scores(tmp_path):
    model, path = of_timm(5), tmp_path / "mae_finetuned_vit.pth"
    torch.save({"model": dict(model.state_dict())}, path)
    opened = stored.open_model(path)
    assert opened.kind == "classifier"
    with torch.no_grad():
        torch.testing.assert_close(opened.classifier(pictures()), model(normalized(pictures())), rtol=1e-5, atol=1e-5)


def test_the_published_sizes_are_read_from_shapes():
    for name, width, depth, heads, patch in (("base", 768, 12, 12, 16), ("huge", 1280, 32, 16, 14)):
        with torch.device("meta"):
            model = timm.models.vision_transformer.VisionTransformer(
                img_size=224, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
            )
        parts = vit.of_table(dict(model.state_dict()), {}, Path(f"mae_pretrain_vit_{name}.pth"))
        assert parts.model["encoder"] == {"depth": depth, "width": width, "heads": heads}
        assert (parts.model["patch"], parts.image_size, parts.model["classes"]) == (patch, 224, None)


def test_places_are_interpolated_for_another_size(tmp_path):
    path = tmp_path / "mae.pth"
    model = save(path)
    encoder, info = stored.load_encoder(path, image_size=48)
    assert (info["kind"], info["image_size"], info["tokenizer"]) == ("pixel_vit", 48, None)
    expected = timm.layers.resample_abs_pos_embed(model.pos_embed, [6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.pos_embed.detach(), expected.detach())
    with pytest.raises(UserError, match=r"inputs.image_size = 50: the patches of mae.pth are 8 px"):
        stored.load_encoder(path, image_size=50)


def test_it_is_an_extractor(tmp_path):
    process.start(threads=1)
    path = tmp_path / "mae.pth"
    save(path)
    extractor = open_extractor(features=f"mae:{path}")
    assert (extractor.name, extractor.width, extractor.logits) == ("mae:mae.pth", WIDTH, None)
    images = (pictures() * 255).round().to(torch.uint8)
    features, _ = extractor.call(images)
    expected = stored.open_model(path).encoder.features(images.float() / 255)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_it_is_opened_from_python(tmp_path):
    path = tmp_path / "mae.pth"
    torch.save({"model": encoder_table(of_timm())}, path)
    model = mage_ds.from_pretrained(path)
    expected = stored.open_model(path).encoder.features(pictures())
    torch.testing.assert_close(model.features(pictures()), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="is a encoder; logits needs a pre-trained MAGE"):
        model.logits(torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.bool))
    with pytest.raises(UserError, match="pictures are 16 x 16: features needs 32 x 32"):
        model.features(torch.zeros(1, 3, 16, 16))


def test_it_is_exported_and_opened_again(tmp_path):
    from mage_ds.interop import exported

    path = tmp_path / "mae.pth"
    save(path)
    parts = stored.open_parts(path)
    (tmp_path / "out").mkdir()
    exported.write(tmp_path / "out", parts)
    opened = stored.open_model(tmp_path / "out")
    with torch.no_grad():
        before = stored.open_model(path).encoder.features(pictures())
        torch.testing.assert_close(opened.encoder.features(pictures()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.pop("blocks.1.attn.qkv.weight"), "1 missing: blocks.1.attn.qkv.weight"),
        (lambda table: table.update(reg_token=torch.zeros(1, 4, WIDTH)), "is no plain ViT, it has reg_token"),
        (lambda table: table.update(pos_embed=torch.zeros(1, 16, WIDTH)), "16 places"),
        (lambda table: table.update(pos_embed=torch.zeros(17, WIDTH)), "pos_embed has 2 dimensions instead of 3"),
        (lambda table: table.pop("cls_token"), "in none of MAE's layouts"),
    ],
)
def test_other_tables_are_refused_in_one_line(tmp_path, change, said):
    table = encoder_table(of_timm())
    change(table)
    torch.save({"model": table}, tmp_path / "bad.pth")
    with pytest.raises(UserError) as caught:
        stored.open_parts(f"mae:{tmp_path / 'bad.pth'}")
    assert said in str(caught.value) and str(caught.value).isprintable()


def test_a_timm_model_sees_what_it_was_trained_to_see(tmp_path):
    name = "vit_tiny_patch16_224"  # trained on pictures of mean and deviation 1/2
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    encoder, _ = stored.load_encoder(f"timm:{name}:{tmp_path / 'tiny.pth'}")
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed((images - 0.5) / 0.5))
        for block in model.blocks:
            x = block(x)
        expected = torch.nn.functional.layer_norm(x[:, 1:].mean(dim=1), (192,), eps=1e-6)
        torch.testing.assert_close(encoder.features(images), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="is no plain ViT"):
        stored.load_encoder("timm:resnet18:" + _resnet(tmp_path))


def _resnet(folder) -> str:
    path = folder / "resnet.pth"
    torch.save(timm.create_model("resnet18").state_dict(), path)
    return str(path)
