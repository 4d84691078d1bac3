"""The Python API against the plain functions of tests/interop, on files of the authors' layout with random values."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from interop import plain_official as plain
from PIL import Image

import mage_ds
from mage_ds import UserError, keyed, pretrained
from mage_ds.recipes.sections import Sampling
from mage_ds.sampling import decode

SIDE, FACTOR, N, CODES = 16, 4, 16, plain.CODES


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each kind, and its values: name -> (path, values)."""
    folder = tmp_path_factory.mktemp("official")
    made = {"mage": plain.make_file(folder / "mage.pth")}
    made["classifier"] = plain.make_file(folder / "classifier.pth", plain.finetuned_values(**plain.TINY, classes=5))
    made["tokenizer"] = plain.make_tokenizer(folder / "tokenizer.ckpt")
    paths = {"mage": "mage.pth", "classifier": "classifier.pth", "tokenizer": "tokenizer.ckpt"}
    return {name: (folder / paths[name], values) for name, values in made.items()}


@pytest.fixture(scope="module")
def opened(files):
    return {name: mage_ds.from_pretrained(path, device="cpu") for name, (path, _) in files.items()}


@pytest.fixture(scope="module")
def mage(opened):
    return opened["mage"]


def photos(count: int, high: int = SIDE, wide: int = SIDE, seed: int = 0) -> torch.Tensor:
    """uint8 (count, 3, high, wide): smooth colours with noise, so that tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(rough, (high, wide), mode="bilinear")
    noise = torch.rand(count, 3, high, wide, generator=generator)
    return (255 * (0.7 * smooth + 0.3 * noise)).to(torch.uint8)


def some_tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(CODES, (count, N), generator=torch.Generator().manual_seed(seed))


# --- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mage", "classifier", "tokenizer"])
def test_tokens_and_pictures_are_the_plain_ones(files, opened, kind):
    model, values = opened[kind], files[kind][1]
    images = photos(3)
    tokens = model.tokenize(images)
    assert tokens.dtype == torch.int64 and (tokens == plain.tokenize(values, images / 255)).all()
    assert len(tokens.unique()) > N  # else any code would pass
    drawn = model.detokenize(tokens)
    expected = plain.detokenize(values, tokens)
    assert drawn.dtype == torch.float32 and expected.min() < 0 and expected.max() > 1
    torch.testing.assert_close(drawn, expected.clamp(0, 1), atol=1e-4, rtol=0)


def test_logits_and_features_are_the_plain_ones(files, mage):
    values, tokens = files["mage"][1], some_tokens(3)
    masked = torch.rand(3, N, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = plain.logits(values, tokens, masked)
    torch.testing.assert_close(mage.logits(tokens, masked), expected, atol=1e-4, rtol=0)
    hidden = torch.where(masked, 10**6, tokens)  # what a hidden place holds is never looked at
    assert (mage.logits(hidden, masked) == mage.logits(tokens, masked)).all()
    images = photos(3)
    expected = plain.features(values, plain.tokenize(values, images / 255))
    torch.testing.assert_close(mage.features(images), expected, atol=1e-4, rtol=0)


def test_a_classifier_has_its_own_features(files, opened):
    values, images = files["classifier"][1], photos(3)
    vectors, scores = plain.classes(values, plain.tokenize(values, images / 255))
    torch.testing.assert_close(opened["classifier"].features(images), vectors, atol=1e-4, rtol=0)
    torch.testing.assert_close(opened["classifier"].classify(images), scores, atol=1e-4, rtol=0)


def test_generated_pictures_are_the_plain_ones(files, mage):
    values, seed, steps = files["mage"][1], 3, 4
    tokens, masked = torch.zeros(2, N, dtype=torch.int64), torch.ones(2, N, dtype=torch.bool)
    for t in range(1, steps + 1):
        noise = (
            torch.from_numpy(keyed.uniform(seed, f"sample.{what}", np.arange(2), t, N))
            for what in ("token", "confidence")
        )
        how = dict(zip(("for_tokens", "for_confidences"), noise, strict=True))
        tokens, masked = plain.sampling_step(values, tokens, masked, t, steps=steps, temperature=2.0, **how)
    expected = plain.detokenize(values, tokens).clamp(0, 1)
    torch.testing.assert_close(mage.generate(2, steps, 2.0, seed), expected, atol=1e-4, rtol=0)


def test_generate_takes_the_models_own_settings(mage):
    own = mage.sampling
    assert set(own) == set(Sampling.model_fields)
    made = mage.generate(2, batch=2)
    assert (made == mage.generate(2, own["steps"], own["temperature"], seed=0, batch=2)).all()
    numpys = np.int64(own["steps"]), np.float32(own["temperature"]), np.uint8(0)
    assert (made == mage.generate(np.int32(2), *numpys, batch=np.int16(2))).all()
    assert (made != mage.generate(2, seed=1, batch=2)).any()


# --- pictures (tests/inputs/test_convert.py has all their kinds) ----------------------------------------------


def test_pictures_come_in_any_kind_one_or_many(mage):
    images = photos(3)
    rows = images.permute(0, 2, 3, 1).contiguous().numpy()
    expected = mage.tokenize(images)
    for many in (images / 255, rows, [Image.fromarray(row) for row in rows], iter(images)):
        assert (mage.tokenize(many) == expected).all()
    for single in (images[0], rows[0], Image.fromarray(rows[0])):
        assert (mage.tokenize(single) == expected[:1]).all()


@pytest.mark.parametrize(
    "given, said",
    [
        ([photos(1)[0], photos(1, 8, 16)[0]], "picture 1 is 8 x 16"),
        (photos(1, 18, 16), "4 must divide both"),
        (photos(0), "no pictures"),
        ([], "no pictures"),
        (iter([]), "no pictures"),
        (photos(1).float(), "divide by 255"),
    ],
)
def test_other_pictures_are_refused_in_one_line(mage, given, said):
    with pytest.raises(UserError) as error:
        mage.tokenize(given)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_iterator_is_read_no_further_than_used(mage):
    taken = []

    def stream():
        for i, image in enumerate(photos(5)):
            taken.append(i)
            yield image if i != 2 else "broken"

    with pytest.raises(UserError, match="picture 2"):
        mage.tokenize(stream(), batch=2)
    assert taken == [0, 1, 2]


# --- sizes ---------------------------------------------------------------------------------------------------


def test_the_tokenizer_takes_any_size_that_its_factor_divides(files, opened):
    model, values = opened["mage"], files["mage"][1]
    images = photos(2, 24, 40)
    tokens = model.tokenize(images)
    assert tokens.shape == (2, 6 * 10) and (tokens == plain.tokenize(values, images / 255)).all()
    rebuilt, *_ = model.tokenizer(images / 255)
    torch.testing.assert_close(model.detokenize(tokens, grid=(6, 10)), rebuilt.clamp(0, 1), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="grid"):
        model.detokenize(tokens)


@pytest.mark.parametrize("method", ["features", "edit"])
@pytest.mark.parametrize("size", [(8, 32), (32, 32)])  # as many tokens as in training, and more
def test_positions_need_the_trained_size(mage, method, size):
    more = {"mask": torch.ones(SIDE, SIDE, dtype=torch.bool)} if method == "edit" else {}
    with pytest.raises(UserError, match=f"{method} needs 16 x 16"):
        getattr(mage, method)(photos(1, *size), **more)


def test_wrong_tokens_and_masks_are_refused(mage):
    tokens, masked = some_tokens(2), torch.zeros(2, N, dtype=torch.bool)
    edit = photos(2)
    for call, said in [
        (lambda: mage.logits(tokens[:, :9], masked[:, :9]), "places for 16"),
        (lambda: mage.logits(tokens, masked[:1]), "tokens' shape"),
        (lambda: mage.logits(tokens, masked.int()), "must be bool"),
        (lambda: mage.logits(tokens.float(), masked), "integers"),
        (lambda: mage.logits(tokens + CODES, masked), "codes 0 to 1023"),
        (lambda: mage.detokenize(tokens - CODES), "codes 0 to 1023"),
        (lambda: mage.edit(edit, masked), r"mask (2, 16): must be (2, 16, 16)"),
        (lambda: mage.edit(edit, torch.ones(1, SIDE, SIDE, dtype=torch.bool)), "(2, 16, 16)"),
        (lambda: mage.edit(edit, torch.ones(SIDE, SIDE)), "must be bool"),
        (lambda: mage.generate(0), "num 0"),
        (lambda: mage.generate(1, steps=0), "steps 0"),
        (lambda: mage.generate(1, temperature=-1), "temperature -1"),
        (lambda: mage.generate(1, batch=0), "batch 0"),
        (lambda: mage.generate(1, class_label=3), "class_label 3"),
        (lambda: mage.generate("3"), "num '3': must be a whole number"),
        (lambda: mage.generate(2.5), "num 2.5"),
        (lambda: mage.generate(True), "num True"),
        (lambda: mage.generate(1, steps=2.5), "steps 2.5"),
        (lambda: mage.generate(1, temperature="hot"), "temperature 'hot'"),
        (lambda: mage.generate(1, temperature=float("nan")), "temperature nan"),
        *((lambda s=s: mage.generate(1, seed=s), f"seed {s}: must") for s in (None, 1.5, -1)),
        *((lambda b=b: mage.tokenize(edit, batch=b), f"batch {b!r}: must") for b in (1.5, "a", False)),
        *((lambda t=t: mage.detokenize(t), "tokens: ") for t in (None, "abc", [[1, 2], [3]], [], tokens[:, :0], 5)),
        (lambda: mage.detokenize(tokens.to_sparse()), "tokens: is a sparse"),
        (lambda: mage.detokenize(tokens, grid=4), "grid 4: must be two numbers"),
        (lambda: mage.detokenize(tokens, grid=(-4, -4)), "grid -4"),
        (lambda: mage.edit(edit, None), "mask: a NoneType"),
        (lambda: mage.edit(edit, torch.ones(SIDE, SIDE, dtype=torch.bool), seed=-1), "seed -1"),
        (lambda: mage_ds.from_pretrained(None), "path None"),
        (lambda: mage_ds.from_pretrained(5), "path 5"),
        (lambda: mage_ds.from_pretrained("R", tokenizer=5), "tokenizer 5"),
        (lambda: mage_ds.from_pretrained("R", step=1.5), "step 1.5"),
        (lambda: mage.edit(edit, torch.ones(SIDE, SIDE, dtype=torch.bool), class_label=3), "class_label 3"),
        (lambda: mage.edit(edit, torch.ones(SIDE, SIDE, dtype=torch.bool), feather=2), "needs composite=True"),
        (lambda: mage.edit(edit, torch.ones(SIDE, SIDE, dtype=torch.bool), index=[1]), "index: 1 are given for 2"),
        (lambda: mage.edit(edit, torch.ones(SIDE, SIDE, dtype=torch.bool), index=0.5), "index 0.5: must be"),
        (lambda: mage.generate(2, guidance=1.5), "guidance 1.5: moves towards a label; give class_label"),
    ]:
        with pytest.raises(UserError) as error:
            call()
        assert said in str(error.value) and "\n" not in str(error.value)


def test_tokens_and_masks_come_as_arrays_too(mage):
    tokens, masked = some_tokens(2), torch.eye(N, dtype=torch.bool)[:2]
    expected = mage.logits(tokens, masked)
    assert (mage.logits(tokens.numpy().astype(np.uint16), masked.numpy()) == expected).all()
    assert (mage.logits(tokens.tolist(), masked.tolist()) == expected).all()
    assert mage.logits(tokens[0], masked[0]).shape == (1, N, CODES)


# --- tiles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 5, None])
def test_results_do_not_depend_on_how_many_are_given(mage, batch):
    images, tokens = photos(7), some_tokens(7)
    masked = torch.rand(7, N, generator=torch.Generator().manual_seed(2)) < 0.5
    mask = masked.unflatten(1, (4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    calls = {
        "tokenize": lambda n: mage.tokenize(images[:n], batch=batch),
        "detokenize": lambda n: mage.detokenize(tokens[:n], batch=batch),
        "logits": lambda n: mage.logits(tokens[:n], masked[:n], batch=batch),
        "features": lambda n: mage.features(images[:n], batch=batch),
        "generate": lambda n: mage.generate(n, steps=3, batch=batch),
        "edit": lambda n: mage.edit(images[:n], mask[:n], steps=3, batch=batch),
    }
    for name, call in calls.items():
        whole = call(7)
        assert len(whole) == 7
        for n in (1, 2, 3, 6):
            assert torch.equal(call(n), whole[:n]), (name, n)


def test_a_tile_on_a_cpu_wastes_little_on_a_single_picture(mage):
    sizes = [mage._batch(None, side * side) for side in (16, 32, 64, 128, 256, 512)]
    assert sizes == [16, 16, 16, 4, 1, 1] and mage._batch(7, 2**20) == 7


# --- dtype, device, and what a file is -----------------------------------------------------------------------


def test_bf16_and_float64(files, mage):
    path, values = files["mage"]
    half = mage_ds.from_pretrained(path, device="cpu", dtype="bfloat16")
    exact = mage_ds.from_pretrained(path, device="cpu", dtype=torch.float64)
    assert {p.dtype for p in half.mage.parameters()} == {torch.bfloat16}
    assert half.tokenizer.quantize.embedding.weight.dtype == torch.float32  # the codebook itself
    images, tokens, masked = photos(4), some_tokens(4), torch.ones(4, N, dtype=torch.bool)
    double = {name: value.double() for name, value in values.items() if value.is_floating_point()}
    torch.testing.assert_close(exact.logits(tokens, masked), plain.logits(double, tokens, masked), atol=1e-9, rtol=0)
    assert (exact.tokenize(images) == plain.tokenize(double, images.double() / 255)).all()
    assert (half.tokenize(images) == exact.tokenize(images)).float().mean() > 0.8
    for model, dtype, most in ((half, torch.float32, 0.1), (mage, torch.float32, 1e-4)):
        for name, given in (("logits", (tokens, masked)), ("detokenize", (tokens,))):
            ours, theirs = getattr(model, name)(*given), getattr(exact, name)(*given)
            assert ours.dtype == dtype and (ours - theirs).abs().max() < most * theirs.abs().max(), name
    edited = half.edit(images, torch.zeros(SIDE, SIDE, dtype=torch.bool), steps=1)
    assert torch.equal(edited, images / 255)


def test_unknown_devices_and_dtypes_are_refused(files):
    path, _ = files["tokenizer"]
    for more, said in [
        ({"device": "gpu"}, "must be cpu, cuda"),
        ({"device": "meta"}, "must be cpu, cuda"),
        ({"device": f"cuda:{torch.cuda.device_count()}"}, "GPU(s) here"),
        ({"dtype": "bf16"}, "bfloat16"),
        ({"dtype": torch.int8}, "bfloat16"),
    ]:
        with pytest.raises(UserError) as error:
            mage_ds.from_pretrained(path, **more)
        assert said in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_what_the_cpu_gives(files, mage):
    gpu = mage_ds.from_pretrained(files["mage"][0])
    assert gpu.device.type == "cuda"
    images, tokens, masked = photos(5), some_tokens(5), torch.eye(N, dtype=torch.bool)[:5]
    assert (gpu.tokenize(images.cuda()).cpu() == mage.tokenize(images)).all()
    for name, given in (("logits", (tokens, masked)), ("detokenize", (tokens,)), ("features", (images,))):
        torch.testing.assert_close(getattr(gpu, name)(*given).cpu(), getattr(mage, name)(*given), atol=1e-4, rtol=0)
    torch.testing.assert_close(gpu.generate(3).cpu(), mage.generate(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "kind, method, needed",
    [
        ("tokenizer", "logits", "pre-trained MAGE"),
        ("tokenizer", "features", "pre-trained MAGE"),
        ("tokenizer", "generate", "pre-trained MAGE"),
        ("tokenizer", "classify", "fine-tuned classifier"),
        ("classifier", "edit", "pre-trained MAGE"),
        ("classifier", "generate", "pre-trained MAGE"),
        ("mage", "classify", "fine-tuned classifier"),
    ],
)
def test_what_a_file_cannot_do_is_said(files, opened, kind, method, needed):
    masked = torch.ones(1, N, dtype=torch.bool)
    given = {"logits": (some_tokens(1), masked), "generate": (1,), "edit": (photos(1), masked)}
    with pytest.raises(UserError) as error:
        getattr(opened[kind], method)(*given.get(method, (photos(1),)))
    for part in (f"{files[kind][0]}: is a {kind}; {method} needs", needed):
        assert part in str(error.value)
    assert kind in repr(opened[kind]) and "float32 on cpu" in repr(opened[kind])


def test_results_can_train_a_probe(mage):
    vectors = mage.features(photos(2))
    assert not vectors.requires_grad and not any(p.requires_grad for p in mage.mage.parameters())
    probe = torch.nn.Linear(vectors.shape[1], 2)
    probe(vectors).sum().backward()  # refused for tensors of inference_mode
    assert probe.weight.grad.abs().sum() > 0


def test_the_callers_settings_are_left_alone(mage):
    before = torch.backends.cudnn.conv.fp32_precision
    mage.tokenize(photos(1))
    assert torch.backends.cudnn.conv.fp32_precision == before and torch.is_grad_enabled()


def test_only_long_work_shows_a_bar(mage, monkeypatch, capsys):
    mage.features(photos(3), batch=1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(pretrained, "_BAR_AFTER_S", 1e-9)
    mage.features(photos(3), batch=1)
    assert "3/3" in capsys.readouterr().err
    mage.generate(3, steps=4, batch=2)
    assert "12/12" in capsys.readouterr().err


def test_public_names_are_lazy():
    code = (
        "import sys, mage_ds\n"
        "assert {'from_pretrained', 'Pretrained', 'UserError'} <= set(dir(mage_ds)) & set(mage_ds.__all__)\n"
        "assert issubclass(mage_ds.UserError, Exception) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert mage_ds.from_pretrained is pretrained.from_pretrained


@pytest.mark.processes
def test_generate_makes_the_pictures_of_sample(tmp_path):
    from sampling.test_sample_task import make_run

    make_run(tmp_path / "run")
    line = f"sample {tmp_path / 'run'} --num 7 --batch 3 --seed 5 --out {tmp_path / 'out'}"
    subprocess.run([sys.executable, "-m", "mage_ds", *line.split()], check=True, capture_output=True)
    model = mage_ds.from_pretrained(tmp_path / "run", device="cpu")
    images = model.generate(7, seed=5, batch=3)
    tokens = np.load(tmp_path / "out" / "tokens.npz")["tokens"]
    assert torch.equal(images, model.detokenize(tokens, batch=3))
    for i, picture in enumerate(decode.pixels(images)):
        with Image.open(tmp_path / "out" / f"{i:06d}.png") as file:
            assert (np.asarray(file) == picture).all()
