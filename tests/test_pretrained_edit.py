"""`generate` with labels, and `edit`, of the Python API: what stays, what is drawn, how it is blended."""

import numpy as np
import pytest
import torch
from interop import plain_official as plain
from made_export import make_export
from test_pretrained import SIDE, photos

import mage_ds
from mage_ds import UserError
from mage_ds.sampling import decode


@pytest.fixture(scope="module")
def mage(tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "mage.pth"
    plain.make_file(path)
    return mage_ds.from_pretrained(path, device="cpu")


# --- edit ----------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(mage, monkeypatch):
    """Tokens of the pictures that were drawn, tile by tile."""
    seen, draw = [], mage._decode
    monkeypatch.setattr(mage, "_decode", lambda tokens, grid: seen.append(tokens) or draw(tokens, grid))
    return seen


def test_known_tokens_stay_and_pictures_have_their_own_number_to_fill(mage, filled):
    images, mask = photos(3), torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    mask[0, :8] = True  # 8 tokens
    mask[1, 3, 4] = True  # one pixel: its token and no neighbour
    mask[2, 7:9, 11:13] = True  # four pixels over a corner of four tokens
    hidden = [set(range(8)), {1}, {6, 7, 10, 11}]
    before = mage.tokenize(images)
    after = mage.edit(images, mask, steps=4, seed=1, batch=2)
    tokens = torch.cat(filled)[:3]
    for i, places in enumerate(hidden):
        changed = set((tokens[i] != before[i]).nonzero().flatten().tolist())
        assert changed <= places and len(changed) >= len(places) - 1  # 1 of 1024 draws the old token again
    assert torch.equal(after, mage.detokenize(tokens, batch=2))
    assert not torch.equal(after, mage.edit(images, mask, steps=4, seed=2, batch=2))


def test_nothing_to_fill_leaves_the_picture_alone(mage):
    images = photos(3)
    mask = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    mask[1] = True
    after = mage.edit(images, mask, steps=3)
    assert torch.equal(after[[0, 2]], images[[0, 2]] / 255) and not torch.equal(after[1], images[1] / 255)


def test_everything_to_fill_is_generate(mage):
    mask = np.ones((SIDE, SIDE), bool)
    made = mage.generate(5, 4, 2.0, seed=5, batch=2)
    for given in (photos(5), iter(photos(5))):
        assert torch.equal(mage.edit(given, mask, 4, 2.0, seed=5, batch=2), made)


def test_composite_keeps_the_pixels_outside(mage):
    images, mask = photos(2), torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    mask[:, 5:9, 2:11] = True
    after = mage.edit(images, mask, steps=3, composite=True)
    whole = mage.edit(images, mask, steps=3)
    for new, drawn, old, region in zip(after, whole, images / 255, mask, strict=True):
        assert torch.equal(new[:, ~region], old[:, ~region]) and torch.equal(new[:, region], drawn[:, region])


@pytest.mark.parametrize("feather", [0, 3])
def test_a_feathered_border_lies_inside(mage, feather):
    images, mask = photos(1), torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[2:15, 3:16] = True
    old, drawn = images[0] / 255, mage.edit(images, mask, steps=3)[0]
    after = mage.edit(images, mask, steps=3, composite=True, feather=feather)[0]
    known = (~mask).nonzero().tolist()
    for y in range(SIDE):
        for x in range(SIDE):
            distance = min(((y - v) ** 2 + (x - u) ** 2) ** 0.5 for v, u in known)
            share = min(1, distance / (feather + 1))
            expected = old[:, y, x] + share * (drawn[:, y, x] - old[:, y, x])
            assert torch.allclose(after[:, y, x], expected, atol=1e-6)
            assert share not in (0, 1) or torch.equal(after[:, y, x], (old, drawn)[int(share)][:, y, x])
    kept, given = (decode.pixels(each[None])[0] for each in (after, old))
    assert (kept[~mask.numpy()] == given[~mask.numpy()]).all()  # byte for byte
    assert (given == images[0].permute(1, 2, 0).numpy()).all()


def test_pictures_of_unlike_masks_are_what_each_is_alone(mage):
    images, mask = photos(2), torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    mask[0, 4:9], mask[1, :3, :3] = True, True
    how = {"steps": 4, "composite": True, "feather": 1, "batch": 2}
    both = mage.edit(images, mask, **how)
    for i in range(2):
        assert torch.equal(both[i : i + 1], mage.edit(images[i : i + 1], mask[i], index=i, **how))
    again = mage.edit(images[[0, 0]], mask[0], index=np.array([0, 7]), **how)
    assert torch.equal(again[0], both[0]) and not torch.equal(again[1], both[0])  # another variant


# --- labels --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    export = make_export(tmp_path_factory.mktemp("made") / "export", classes=3, guidance=2.0, order="halton")
    return mage_ds.from_pretrained(export, device="cpu")


def test_labels_one_for_all_or_one_for_each(conditional):
    made = {label: conditional.generate(3, class_label=label, batch=2) for label in (0, 2, -1)}
    assert not torch.equal(made[0], made[2])
    each = conditional.generate(3, class_label=[0, 2, -1], batch=2)
    for i, label in enumerate((0, 2, -1)):
        assert torch.equal(each[i], made[label][i])
    assert torch.equal(conditional.generate(3, class_label=np.array([0, 2, -1]), batch=2), each)
    free = conditional.generate(3, batch=2)  # a model with classes makes pictures of any class too
    assert torch.equal(conditional.generate(3, class_label=-1, guidance=0, batch=2), free)
    edited = conditional.edit(each, np.ones((32, 32), bool), class_label=[0, 2, -1], batch=2)
    assert torch.equal(edited, each)


def test_the_models_own_sampling_is_in_force(conditional):
    own = conditional.sampling
    assert (own["guidance"], own["order"]) == (2.0, "halton")
    made = conditional.generate(2, class_label=1, batch=2)
    tokens, labels = torch.zeros(2, 64, dtype=torch.int64), torch.tensor([1, 1])
    noise = decode.keyed_noise(0, np.arange(2), 64)
    how = {"steps": 4, "temperature": 2.0, "order": "halton", "guidance": 2.0}
    filled = decode.decode(conditional.mage, tokens, tokens == 0, noise=noise, labels=labels, **how)
    assert torch.equal(made, conditional.detokenize(filled, batch=2))
    assert not torch.equal(made, conditional.generate(2, class_label=1, guidance=0, batch=2))


@pytest.mark.parametrize(
    "label, said",
    [
        (3, "class_label 3: must be from 0 to 2, or -1"),
        (-2, "class_label -2: must be from"),
        ([0, 1], "class_label: 2 are given for 3 picture(s)"),
        ([0, 1, 9], "from 0 to 2"),
        ([[0, 1, 2]], "one for each picture"),
        (0.5, "one whole number"),
        (True, "one whole number"),
        ("cat", "class_label: a str that makes no tensor"),
    ],
)
def test_wrong_labels_are_refused(conditional, label, said):
    with pytest.raises(UserError) as error:
        conditional.generate(3, class_label=label)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_model_that_always_saw_a_label_needs_one(tmp_path):
    never = mage_ds.from_pretrained(make_export(tmp_path / "never", classes=3, label_dropout=0), device="cpu")
    some = mage_ds.from_pretrained(make_export(tmp_path / "some", classes=3, label_dropout=0.1), device="cpu")
    assert (never.label_dropout, some.label_dropout) == (0, 0.1)
    picture, mask = np.zeros((32, 32, 3), np.uint8), np.ones((32, 32), bool)
    for call in (lambda model, **how: model.generate(1, **how), lambda model, **how: model.edit(picture, mask, **how)):
        call(never, class_label=1, steps=1)
        for how, said in [
            ({}, "class_label: this model was trained with label_dropout 0 and cannot do without a label; give one"),
            ({"class_label": [-1]}, "class_label: this model was trained with label_dropout 0"),
            ({"class_label": 1, "guidance": 2}, "guidance 2: this model was trained with label_dropout 0"),
        ]:
            with pytest.raises(UserError) as error:
                call(never, **how)
            assert str(error.value).startswith(said) and "\n" not in str(error.value)
            call(some, steps=1, **how)


def test_how_tokens_are_drawn_may_be_given(conditional):
    tokens, labels, seen = torch.zeros(2, 64, dtype=torch.int64), torch.tensor([1, 1]), []
    noise = decode.keyed_noise(0, np.arange(2), 64)
    for more in ({"order": "confidence"}, {"token_temperature": 0.5}, {"guidance_schedule": "linear"}):
        how = conditional.sampling | more
        filled = decode.decode(conditional.mage, tokens, tokens == 0, noise=noise, labels=labels, **how)
        made = conditional.generate(2, class_label=1, batch=2, **more)
        assert torch.equal(made, conditional.detokenize(filled, batch=2))
        assert torch.equal(made, conditional.edit(made, np.ones((32, 32), bool), class_label=1, batch=2, **more))
        seen.append(made.numpy().tobytes())
    assert len({*seen, conditional.generate(2, class_label=1, batch=2).numpy().tobytes()}) == 4
    for more, said in [
        ({"order": "random"}, "order 'random': must be one of confidence, halton"),
        ({"guidance_schedule": 3}, "guidance_schedule 3: must be one of constant, linear"),
        ({"token_temperature": -1}, "token_temperature -1: must be a finite number"),
    ]:
        with pytest.raises(UserError, match=said):
            conditional.generate(2, class_label=1, **more)
