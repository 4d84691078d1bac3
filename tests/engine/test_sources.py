"""Pictures as they lie somewhere -> the same arrays from every kind of place, in any order; the rest in one line."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from mage_ds.engine.sources import open_source
from mage_ds.errors import UserError
from mage_ds.report import pictures

N, SIDE = 10, 12


def picture(i, width=SIDE, height=SIDE):
    coarse = Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


PIXELS = np.stack([np.asarray(picture(i)) for i in range(N)])
LABELS = np.arange(N) % 3


def png(image, **options):
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_folder(root, numbers=range(N)):
    for i in numbers:
        (root / f"class{LABELS[i]}").mkdir(parents=True, exist_ok=True)
        (root / f"class{LABELS[i]}" / f"{i:02d}.png").write_bytes(png(picture(i)))
    return root


def make_tars(root):
    root.mkdir()
    for at in (0, 6):
        members = [(f"{i:02d}.png", png(picture(i))) for i in range(at, min(N, at + 6))]
        members += [(f"{i:02d}.cls", b"%d" % LABELS[i]) for i in range(at, min(N, at + 6))]
        tar_of(root / f"{at}.tar", members)
    return root


def make_sample(root, form, labels="0..2", **more):
    """The layout that `mage-ds sample` documents, in tars of 8."""
    root.mkdir()
    given = {"num": N, "complete": True, "format": form, "batch": 4, "seed": 0, "class_label": labels}
    (root / "manifest.json").write_text(json.dumps(given | {"classes": ["cat", "dog", "owl"]} | more))
    (root / "manifest.csv").write_text("index,label,seed,file,sha256\n")
    (root / "grid.png").write_bytes(png(picture(0, 99, 99)))
    if form == "png":
        for i in range(N):
            (root / f"{i:06d}.png").write_bytes(png(picture(i)))
    elif form == "tar":
        for at in (0, 8):
            tar_of(root / f"{at // 8:05d}.tar", [(f"{i:06d}.png", png(picture(i))) for i in range(at, min(N, at + 8))])
    else:
        np.savez(root / "samples.npz", arr_0=PIXELS, arr_1=LABELS)
    return root


def make_npz(path, save=np.savez, **arrays):
    save(path, **({"arr_0": PIXELS, "arr_1": LABELS} | arrays))
    return path


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pictures, "_SHARD", 8)


PLACES = {
    "folder": make_folder,
    "tars": make_tars,
    "sample of png": lambda path: make_sample(path, "png"),
    "sample of tar": lambda path: make_sample(path, "tar"),
    "sample of npz": lambda path: make_sample(path, "npz"),
    "npz": lambda path: make_npz(path.with_suffix(".npz")),
    "packed npz": lambda path: make_npz(path.with_suffix(".npz"), np.savez_compressed),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_gives_the_same(place, tmp_path):
    path = PLACES[place](tmp_path / "set")
    source = open_source(path)
    order = np.argsort(LABELS, kind="stable") if place == "folder" else np.arange(N)  # a folder's: by name
    assert (source.n, source.size) == (N, SIDE) and (source.labels == LABELS[order]).all()
    assert source.labels.dtype == np.int64
    for index in ([0, 1, 2, 3], [8, 9, 10, 11], [7, 3, 9, 0], [2]):
        read, real = source.read(np.array(index)), [i for i in index if i < N]
        assert read.dtype == np.uint8 and (read[: len(real)] == PIXELS[order[real]]).all()
        assert not read[len(real) :].any()
    facts = source.facts
    assert (facts["source"], facts["kind"]) == (
        str(path.resolve()),
        place.split()[-1] if "npz" in place and "sample" not in place else place.split()[0],
    )
    assert (facts["height"], facts["width"], facts["resized"]) == (SIDE, SIDE, None)
    json.dumps(facts)
    assert source.sizes is None and str(path) in source.name(N - 1)
    assert open_source(path).facts["fingerprint"] == facts["fingerprint"]


def test_what_is_counted_and_named(tmp_path):
    folder = make_folder(tmp_path / "set")
    (folder / "class1" / "00.jpg").write_bytes(png(picture(0), format="JPEG"))
    source = open_source(folder)
    assert source.facts["formats"] == {".png": N, ".jpg": 1} and source.facts["classes"] == [
        "class0",
        "class1",
        "class2",
    ]
    assert source.name(4) == str(folder / "class1" / "00.jpg")
    sampled = open_source(make_sample(tmp_path / "made", "png", seed=7))
    assert sampled.facts["manifest"]["seed"] == 7 and sampled.facts["classes"] == ["cat", "dog", "owl"]
    assert open_source(make_sample(tmp_path / "none", "png", labels=None)).labels is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_papers_protocol_is_torchvisions(tmp_path, kind):
    """Resize and CenterCrop of torchvision, on what Pillow opens; EXIF's rotation does not count there."""
    turned = Image.Exif()
    turned[0x0112] = 6
    shapes = [(40, 30), (31, 57), (16, 16), (90, 16), (9, 8), (33, 32)]
    for i, shape in enumerate(shapes):
        (tmp_path / f"{i}.{kind.lower()}").write_bytes(png(picture(i, *shape), format=kind, exif=turned))
    (tmp_path / "6.png").write_bytes(png(picture(6, 30, 20).convert("RGBA")))
    (tmp_path / "7.png").write_bytes(png(picture(7, 20, 30).convert("L")))
    source = open_source(tmp_path, size=16)
    plain = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16)])
    for i in range(8):
        with Image.open(source.name(i)) as image:
            expected = np.asarray(plain(image.convert("RGB")))
        assert (source.read(np.array([i]))[0] == expected).all(), i
    assert (source.size, source.facts["resized"]) == (16, 16)
    assert source.sizes(np.array([1, 0])).tolist() == [[57, 31], [30, 40]]


def test_arrays_are_resized_too(tmp_path):
    source = open_source(make_npz(tmp_path / "set.npz"), size=5)
    resized = transforms.Resize(5)(picture(3))
    assert (source.read(np.array([3]))[0] == np.asarray(resized)).all()
    assert source.sizes(np.array([3])).tolist() == [[SIDE, SIDE]]


def test_an_array_is_not_read_as_a_whole(tmp_path):
    path = tmp_path / "large.npz"
    np.savez(path, arr_0=np.zeros((3000, 32, 32, 3), np.uint8))
    before = resident()
    source = open_source(path)
    assert source.read(np.arange(64)).nbytes == 64 * 32 * 32 * 3
    assert resident() - before < 4e6 < path.stat().st_size / 2


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_splits(tmp_path):
    make_folder(tmp_path / "data" / "train", range(6))
    make_folder(tmp_path / "data" / "val", range(6, N))
    data = tmp_path / "data"
    assert open_source(data).n == open_source(data, split="val").n == open_source(f"{data}:val").n == 4
    assert open_source(f"{data}:train").n == 6 and open_source(data / "train").n == 6
    assert [open_source(f"{data}:{split}").facts["split"] for split in ("train", "val")] == ["train", "val"]
    assert open_source(data).facts["classes"] == ["class0", "class1", "class2"]
    refused(lambda: open_source(f"{data / 'train'}:val"), "has no val/")


def unlike(path):
    make_folder(path)
    (path / "class2" / "99.png").write_bytes(png(picture(0, 13, SIDE)))


def written(data, name="class2/99.png"):
    def make(path):
        make_folder(path)
        (path / name).write_bytes(data)

    return make


def cut(path):
    make_npz(path)
    path.write_bytes(path.read_bytes()[:-400])


def cut_tar(path):
    make_sample(path, "tar")
    tar_of(path / "00001.tar", [("000008.png", png(picture(8)))])


BROKEN = {  # found when the picture is read
    "unlike sizes": (unlike, "class2/99.png is 13 x 12, {}/class0/00.png is 12 x 12"),
    "truncated": (written(png(picture(0))[:-40]), "class2/99.png: is no readable picture"),
    "garbage": (written(b"garbage"), "class2/99.png: is no readable picture"),
    "empty": (written(b""), "class2/99.png: is no readable picture"),
    "16 bits": (
        written(png(Image.fromarray(np.zeros((12, 12), np.uint16)))),
        "class2/99.png: is of Pillow's mode I;16",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named(name, tmp_path):
    make, said = BROKEN[name]
    make(tmp_path / "set")
    source = open_source(tmp_path / "set")
    source.read(np.arange(4))
    refused(lambda: source.read(np.arange(8, 12)), said.format(tmp_path / "set"))


def damaged_png(path):
    make_sample(path, "png")
    (path / "000000.png").unlink()


FLOATS = (PIXELS / 255).astype(np.float32)
BAD = {
    "missing": (lambda path: None, "no such folder of pictures or tars"),
    "empty folder": (lambda path: path.mkdir(), "empty folder"),
    "text": (lambda path: path.write_text("x"), "not readable as an .npz"),
    "truncated": (cut, "not readable as an .npz"),
    "statistics": (
        lambda path: np.savez(path, mu=np.zeros(2), sigma=np.eye(2)),
        "holds mu.npy, sigma.npy and no arr_0",
    ),
    "floats": (lambda path: make_npz(path, arr_0=FLOATS), "arr_0 is float32 (10, 12, 12, 3)"),
    "colours first": (lambda path: make_npz(path, arr_0=PIXELS.transpose(0, 3, 1, 2)), "colours come last"),
    "grey": (lambda path: make_npz(path, arr_0=PIXELS[..., :1]), "arr_0 is uint8 (10, 12, 12, 1)"),
    "objects": (lambda path: make_npz(path, arr_0=np.array([{}])), "arr_0 is object"),
    "other labels": (lambda path: make_npz(path, arr_1=LABELS[:3]), "arr_1 is int64 (3,), must be 10 labels"),
    "labels of objects": (lambda path: make_npz(path, arr_1=np.array([{}] * N)), "arr_1 is object (10,)"),
    "incomplete": (lambda path: make_sample(path, "png", complete=False), "are not complete"),
    "first gone": (damaged_png, "000000.png: is no readable picture"),
    "short tar": (cut_tar, "00001.tar: lacks 000009.png"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_places_are_refused_in_one_line(name, tmp_path):
    make, said = BAD[name]
    path = tmp_path / (
        "set" if name in ("missing", "empty folder", "incomplete", "first gone", "short tar") else "s.npz"
    )
    make(path)
    refused(lambda: open_source(path), said)


def test_a_damaged_stream_is_named(tmp_path):
    path = make_npz(tmp_path / "s.npz", np.savez_compressed)
    data = bytearray(path.read_bytes())
    data[3000:3010] = bytes(10)
    path.write_bytes(data)
    source = open_source(path)
    refused(lambda: source.read(np.arange(N)), "s.npz[")


def refused(action, said):
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert said in message and message.isprintable(), message
