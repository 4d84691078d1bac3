"""The decoder that takes a label, and the frozen encoder below it: the two halves of a Mage, alone and together."""

import pytest
import torch
from torch.nn import functional as F

from mage_ds import recipes
from mage_ds.engine import made, planner
from mage_ds.models import Decoder, Encoder, Mage
from mage_ds.models.masking import masks

N, CODES, CLASSES, WIDTH = 9, 11, 3, 16
ENCODER = {"encoder": {"depth": 2, "width": WIDTH, "heads": 2}, "tokens": N, "codes": CODES, "vocabulary": 13}
DECODER = {"decoder": {"depth": 2, "width": 24, "heads": 4}, "tokens": N, "vocabulary": 13}


def filled(model, dtype=torch.float32):
    """Values far from the initial ones: zero biases and unit scales would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype).eval()


def mage(padding="cls", classes=CLASSES, dtype=torch.float32):
    return filled(Mage(**ENCODER, decoder=DECODER["decoder"], dropout=0.1, padding=padding, classes=classes), dtype)


def inputs(batch=4):
    """Tokens, masks with unlike numbers of masked positions, and half of the positions kept."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(CODES, (batch, N), generator=generator)
    ratio = torch.tensor([0.6, 0.8, 1.0, 0.6])[:batch]
    return tokens, *masks(torch.rand(batch, N, generator=generator), ratio, 0.5)


LABELS = torch.tensor([0, 2, 1, -1])


# --- sizes


def test_parameters_of_the_papers_decoder():
    """Twelve blocks of 768 and a label embedding, layer by layer. The paper says "113 M", which its words do not reach:
    the other 26 M are in no source (paper.md section 5)."""
    w = 768
    norm, linear = 2 * w, w * w + w
    block = 2 * norm + 3 * linear + linear + (w * 4 * w + 4 * w) + (4 * w * w + w)  # norms, qkv, projection, MLP
    labels = 1000 * w + w  # one for "no label is given"
    head = linear + norm + 1026  # a bias a word; the word vectors are the encoder's
    by_hand = 12 * block + norm + linear + 257 * w + labels + head  # norm; from the encoder; positions
    assert by_hand == 87_205_890
    recipe = recipes.load_recipe("class_conditional_vit_base")
    sizes = planner.parameters(recipe)
    assert sum(sizes) == by_hand < 113e6
    header = recipes.recipe_file("class_conditional_vit_base").read_text()
    assert f"{by_hand:,}" in header and "113 M" in header
    with torch.device("meta"):
        encoder = made.encoder_of(recipe)
    assert sum(p.numel() for p in encoder.parameters()) == 12 * block + norm + (1026 + 257) * w + norm


# --- the halves and the whole


@pytest.mark.parametrize("padding", ["cls", "mask"])
@pytest.mark.parametrize("classes", [CLASSES, None])
def test_the_halves_with_its_weights_equal_the_whole_bit_for_bit(padding, classes):
    whole = mage(padding, classes)
    halves = (
        Encoder(**ENCODER, dropout=0.1),
        Decoder(**DECODER, width=WIDTH, dropout=0.1, padding=padding, classes=classes),
    )
    names = [list(half.state_dict()) for half in halves]
    assert sorted(names[0] + names[1]) == sorted(whole.state_dict())  # no name twice, none left
    for half, own in zip(halves, names, strict=True):
        half.load_state_dict({name: whole.state_dict()[name] for name in own})
        half.eval()
    encoder, decoder = halves
    tokens, masked, keep = inputs()
    labels = None if classes is None else LABELS
    for kept in (keep, None):
        x = encoder(tokens, masked, kept)
        together = decoder(x, masked, kept, encoder.code_vectors(), labels)
        assert torch.equal(together, whole(tokens, masked, kept, labels))
    assert torch.equal(encoder.features(tokens), whole.features(tokens))


# --- labels


def test_no_label_is_the_last_embedding():
    whole = mage()
    tokens, masked, keep = inputs()
    without = whole(tokens, masked, keep)
    for none in (torch.full((4,), -1), torch.full((4,), -7)):
        assert torch.equal(whole(tokens, masked, keep, none), without)
    with torch.no_grad():
        whole.label_embeddings.weight[:CLASSES] += 1.0
    assert torch.equal(whole(tokens, masked, keep), without)
    with torch.no_grad():
        whole.label_embeddings.weight[CLASSES] += 1.0
    assert (whole(tokens, masked, keep) != without).any()


def test_a_label_changes_its_own_sample_at_every_position():
    whole = mage()
    tokens, masked, keep = inputs()
    one = whole(tokens, masked, keep, LABELS)
    other = whole(tokens, masked, keep, torch.tensor([0, 2, 0, -1]))
    assert one.shape == (4, N, CODES)
    assert (one != other).any(dim=2).all(dim=1).tolist() == [False, False, True, False]
    assert torch.equal(one[[0, 1, 3]], other[[0, 1, 3]])


def test_the_label_is_one_more_token_behind_the_padded_ones():
    """Against the same blocks on a sequence that is put together by hand."""
    whole = mage(dtype=torch.float64)
    tokens, masked, keep = inputs()
    padded = whole._padded(
        whole.decoder_embed(Encoder.forward(whole, tokens, masked, keep)), F.pad(masked, (1, 0)), keep
    )
    for i, label in enumerate([0, 2, 1, CLASSES]):
        x = torch.cat([padded[i], whole.label_embeddings.weight[label][None]])[None]
        assert x.shape == (1, 1 + N + 1, 24)
        for block in whole.decoder_blocks:
            x = block(x)
        expected = whole.mlm_layer(whole.decoder_norm(x[:, 1:-1]), whole.token_emb.word_embeddings.weight[:CODES])
        torch.testing.assert_close(whole(tokens, masked, keep, LABELS)[i : i + 1], expected, rtol=1e-12, atol=1e-12)


def test_each_embedding_learns_from_its_own_samples():
    whole = mage()
    tokens, masked, keep = inputs(3)
    whole(tokens, masked, keep, torch.tensor([2, -1, 2])).square().sum().backward()
    moved = (whole.label_embeddings.weight.grad != 0).any(dim=1)
    assert moved.tolist() == [False, False, True, True]


# --- guidance


def test_guided_logits_equal_two_plain_passes():
    whole = mage(dtype=torch.float64)
    tokens, masked, keep = inputs()
    for kept in (keep, None):
        for scale in (0.0, 0.5, 3.0):
            given, free = whole(tokens, masked, kept, LABELS), whole(tokens, masked, kept)
            guided = whole(tokens, masked, kept, LABELS, torch.tensor(scale))
            assert guided.dtype == torch.float32  # whatever the model computes in
            torch.testing.assert_close(guided, (given + scale * (given - free)).float(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(guided[3], free[3].float())  # a sample without a label cannot be guided


def test_the_encoder_runs_once_where_the_decoder_is_guided():
    whole, seen = mage(), []
    whole.blocks[0].register_forward_hook(lambda block, args, output: seen.append(("encoder", len(output))))
    whole.decoder_blocks[0].register_forward_hook(lambda block, args, output: seen.append(("decoder", len(output))))
    whole(*inputs(), LABELS, torch.tensor(1.0))
    assert seen == [("encoder", 4), ("decoder", 8)]


# --- static shapes


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_forward_on_the_meta_device_and_as_one_graph(guidance):
    """A host read or a shape that hangs on data raises there."""
    whole = mage()
    tokens, masked, keep = inputs()
    scale = None if guidance is None else torch.tensor(guidance)
    expected = whole(tokens, masked, keep, LABELS, scale)
    compiled = torch.compile(whole, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, masked, keep, LABELS, scale), expected)
    moved = [None if each is None else each.to("meta") for each in (tokens, masked, keep, LABELS, scale)]
    assert whole.to("meta")(*moved).shape == expected.shape
