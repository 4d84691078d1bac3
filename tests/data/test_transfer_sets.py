"""The scripts of data/ on tiny archives of the published layouts: official splits, class folders, bytes."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import aircraft
import archives
import caltech101
import cars
import cifar10
import cifar100
import dtd
import flowers102
import food101
import imagenet_val
import numpy as np
import pets
import pytest
import scipy.io
from PIL import Image

from mage_ds.errors import UserError
from mage_ds.inputs.catalog import open_catalog

DATA = Path(archives.__file__).parent


def picture(number, form="jpeg") -> bytes:
    """A picture that no other number has."""
    made = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(made, form)
    return made.getvalue()


def tar(path: Path, members: dict[str, bytes], mode="w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def matlab(**variables) -> bytes:
    made = io.BytesIO()
    scipy.io.savemat(made, variables)
    return made.getvalue()


def records(rows: list[dict], **kinds) -> np.ndarray:
    """A struct array of MATLAB, (1, n)."""
    made = np.zeros((1, len(rows)), dtype=[(name, object) for name in kinds])
    for i, row in enumerate(rows):
        for name, kind in kinds.items():
            made[0, i][name] = kind(row[name])
    return made


def as_published(dataset, files):
    """The data set whose published checksums are those of these files."""
    sums = [hashlib.md5(file.read_bytes()).hexdigest() for file in files]
    return dataset._replace(archives=dict(zip(dataset.archives, sums, strict=True)))


def make(dataset, files, out):
    archives.make(as_published(dataset, files), files, out)
    return found(out)


def found(out) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != archives.DONE
    }


# --- the archives: each returns files, and what must come of them


def of_cifar10(folder):
    rng = np.random.default_rng(0)
    tables, expected, at = {}, {}, {"train": 0, "val": 0}
    for name, split in [*((f"data_batch_{k}.bin", "train") for k in range(1, 6)), ("test_batch.bin", "val")]:
        table = b""
        for _ in range(2):
            label, pixels = int(rng.integers(3)), rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            table += bytes([label]) + b"".join(pixels[..., colour].tobytes() for colour in range(3))
            expected[f"{split}/{('cat', 'dog', 'frog')[label]}/{at[split]:05d}.png"] = pixels
            at[split] += 1
        tables[f"cifar-10-batches-bin/{name}"] = table
    tables["cifar-10-batches-bin/batches.meta.txt"] = b"cat\ndog\nfrog\n\n"
    return [tar(folder / "a.tar.gz", tables)], expected


def of_cifar100(folder):
    rng = np.random.default_rng(1)
    tables, expected = {"cifar-100-binary/fine_label_names.txt": b"apple\naquarium_fish\n"}, {}
    tables["cifar-100-binary/coarse_label_names.txt"] = b"fruit\nfish\n"
    for name, split in (("train.bin", "train"), ("test.bin", "val")):
        table = b""
        for at, fine in enumerate((1, 0, 1)):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            table += bytes([7, fine]) + pixels.transpose(2, 0, 1).tobytes()
            expected[f"{split}/{('apple', 'aquarium_fish')[fine]}/{at:05d}.png"] = pixels
        tables[f"cifar-100-binary/{name}"] = table
    return [tar(folder / "a.tar.gz", tables)], expected


def of_food101(folder):
    lists = {"train": ["apple_pie/1", "waffles/2", "waffles/3"], "test": ["waffles/4", "apple_pie/5"]}
    images = {name: picture(int(name[-1])) for names in lists.values() for name in names}
    members = {f"food-101/images/{name}.jpg": data for name, data in images.items()}
    members["food-101/images/waffles/9.jpg"] = picture(9)  # in no list
    members["food-101/meta/train.json"] = b"{}"
    members |= {f"food-101/meta/{split}.txt": "\n".join(names).encode() for split, names in lists.items()}
    expected = {f"train/{name}.jpg": images[name] for name in lists["train"]}
    return [tar(folder / "a.tar.gz", members)], expected | {f"val/{n}.jpg": images[n] for n in lists["test"]}


def of_dtd(folder):
    lists = {"train1": [1], "val1": [2], "test1": [3], "train2": [3], "val2": [1], "test2": [2]}
    name = "{0}/{0}_{1:04d}.jpg"
    kinds = ("banded", "zigzagged")
    images = {name.format(kind, k): picture(10 * k + (kind == "banded")) for kind in kinds for k in (1, 2, 3)}
    members = {f"dtd/images/{each}": data for each, data in images.items()}
    for part, numbers in lists.items():
        members[f"dtd/labels/{part}.txt"] = "".join(f"{name.format(c, k)}\n" for c in kinds for k in numbers).encode()
    splits = {1: "train", 2: "train", 3: "val"}
    expected = {f"{splits[k]}/{name.format(c, k)}": images[name.format(c, k)] for c in kinds for k in splits}
    return [tar(folder / "a.tar.gz", members)], expected


def of_aircraft(folder):
    top = "fgvc-aircraft-2013b/data"
    lists = {"trainval": {"0000001": "F/A-18", "0000002": "Boeing 717"}, "test": {"0000003": "F/A-18"}}
    lists["train"] = {"0000001": "F/A-18"}
    members = {
        f"{top}/images_variant_{part}.txt": "".join(f"{k} {v}\n" for k, v in table.items()).encode()
        for part, table in lists.items()
    }
    members |= {f"{top}/images/{k:07d}.jpg": picture(k) for k in (1, 2, 3, 4)}
    expected = {"train/F_A-18/0000001.jpg": 1, "train/Boeing 717/0000002.jpg": 2, "val/F_A-18/0000003.jpg": 3}
    return [tar(folder / "a.tar.gz", members)], {name: picture(k) for name, k in expected.items()}


def of_pets(folder):
    """One of the files is a GIF by its bytes, as some of the published ones are no JPEG."""
    members = {f"images/{name}.jpg": picture(k) for k, name in enumerate(("Abyssinian_1", "saint_bernard_2"))}
    members |= {"images/Abyssinian_3.jpg": picture(3, "gif"), "images/Abyssinian_3.mat": b"no picture"}
    lists = {"trainval": b"Abyssinian_1 1 1 1\nsaint_bernard_2 2 2 1\n", "test": b"Abyssinian_3 1 1 1\n"}
    lists = {f"annotations/{name}.txt": text for name, text in lists.items()}
    gif = np.asarray(Image.open(io.BytesIO(picture(3, "gif"))).convert("RGB"))
    expected = {"train/Abyssinian/Abyssinian_1.jpg": picture(0), "train/saint_bernard/saint_bernard_2.jpg": picture(1)}
    files = [tar(folder / "images.tar.gz", members), tar(folder / "annotations.tar.gz", lists)]
    return files, expected | {"val/Abyssinian/Abyssinian_3.png": gif}


def of_flowers102(folder):
    labels, splits = [1, 102, 1, 102, 5], {"trnid": [[2, 1]], "valid": [[4]], "tstid": [[3, 5]]}
    (folder / "labels.mat").write_bytes(matlab(labels=np.array([labels], dtype=np.uint8)))
    (folder / "setid.mat").write_bytes(matlab(**{k: np.array(v, dtype=np.uint16) for k, v in splits.items()}))
    images = tar(folder / "a.tgz", {f"jpg/image_{k:05d}.jpg": picture(k) for k in range(1, 6)})
    expected = {"train/001": [1], "train/102": [2, 4], "val/001": [3], "val/005": [5]}
    files = [images, folder / "labels.mat", folder / "setid.mat"]
    return files, {f"{where}/image_{k:05d}.jpg": picture(k) for where, numbers in expected.items() for k in numbers}


def of_cars(folder):
    names = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]
    kinds = {"bbox_x1": np.uint16, "class": np.uint8, "fname": str}
    lists = {"train": [(1, 2), (2, 1)], "test": [(1, 2), (2, 2)]}
    tables = {
        part: matlab(
            annotations=records([{"bbox_x1": 3, "class": c, "fname": f"{k:05d}.jpg"} for k, c in rows], **kinds)
        )
        for part, rows in lists.items()
    }
    meta = matlab(class_names=np.array([names], dtype=object))
    kit = tar(
        folder / "kit.tgz",
        {"devkit/cars_meta.mat": meta, "devkit/cars_train_annos.mat": tables["train"], "devkit/README.txt": b""},
    )
    (folder / "labels.mat").write_bytes(tables["test"])
    parts = [
        tar(folder / f"{part}.tgz", {f"cars_{part}/{k:05d}.jpg": picture(k + (part == "test") * 50) for k in (1, 2)})
        for part in lists
    ]
    safe = ["AM General Hummer SUV 2000", "Ram C_V Cargo Van Minivan 2012"]
    expected = {f"train/{safe[1]}/00001.jpg": 1, f"train/{safe[0]}/00002.jpg": 2}
    expected |= {f"val/{safe[1]}/00001.jpg": 51, f"val/{safe[1]}/00002.jpg": 52}
    return [*parts, kit, folder / "labels.mat"], {name: picture(k) for name, k in expected.items()}


def of_caltech101(folder):
    counts = {"accordion": 31, "Faces": 33, "BACKGROUND_Google": 2}
    members = {
        f"101_ObjectCategories/{label}/image_{k:04d}.jpg": picture(100 * len(label) + k)
        for label, number in counts.items()
        for k in range(1, number + 1)
    }
    inner = tar(folder / "inner.tar.gz", members | {"101_ObjectCategories/BACKGROUND_Google/tmp": b""})
    with zipfile.ZipFile(folder / "a.zip", "w") as outer:
        outer.write(inner, "caltech-101/101_ObjectCategories.tar.gz")
        outer.writestr("caltech-101/Annotations.tar", b"")
    expected = {}
    for label in ("accordion", "Faces"):
        names = [f"{label}/image_{k:04d}.jpg" for k in range(1, counts[label] + 1)]
        names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        expected |= {f"train/{name}": members[f"101_ObjectCategories/{name}"] for name in names[:30]}
        expected |= {f"val/{name}": members[f"101_ObjectCategories/{name}"] for name in names[30:]}
    return [folder / "a.zip"], expected


def of_imagenet_val(folder):
    """The development kit's ids are not in the order of the folders' names, and it has synsets above the classes."""
    rows = [(1, "n02119789", 0), (2, "n01440764", 0), (3, "n00001740", 2)]
    kinds = {"ILSVRC2012_ID": np.int16, "WNID": str, "words": str, "num_children": np.uint8}
    table = [dict(zip(kinds, (k, name, "kit fox, fox", n), strict=True)) for k, name, n in rows]
    top = "ILSVRC2012_devkit_t12/data"
    meta = matlab(synsets=records(table, **kinds).T)
    kit = {f"{top}/meta.mat": meta, f"{top}/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n2\n"}
    names = [f"ILSVRC2012_val_{k:08d}.JPEG" for k in (1, 2, 3)]
    images = tar(folder / "val.tar", {name: picture(k) for k, name in enumerate(names)}, "w")
    labels = ("n01440764", "n02119789", "n01440764")
    expected = {f"{label}/ILSVRC2012_val_{k + 1:08d}.jpg": picture(k) for k, label in enumerate(labels)}
    return [images, tar(folder / "kit.tar.gz", kit)], expected


SETS = {
    "cifar10": (cifar10.CIFAR10, of_cifar10),
    "cifar100": (cifar100.CIFAR100, of_cifar100),
    "food101": (food101.FOOD101, of_food101),
    "dtd": (dtd.DTD, of_dtd),
    "aircraft": (aircraft.AIRCRAFT, of_aircraft),
    "pets": (pets.PETS, of_pets),
    "flowers102": (flowers102.FLOWERS102, of_flowers102),
    "cars": (cars.CARS, of_cars),
    "caltech101": (caltech101.CALTECH101, of_caltech101),
    "imagenet_val": (imagenet_val.IMAGENET_VAL, of_imagenet_val),
}


def test_every_script_is_tested_and_in_the_readme():
    scripts = {path.stem for path in DATA.glob("*.py")} - {"archives"}
    assert scripts == set(SETS)
    readme = (DATA / "README.md").read_text()
    for name, (dataset, _) in SETS.items():
        assert f"data/{name}.py" in readme
        for archive, digest in dataset.archives.items():
            assert archive in readme
            assert len(digest) == 32 and set(digest) <= set("0123456789abcdef")


@pytest.mark.parametrize("name", SETS)
def test_pictures_lie_where_the_official_split_says(name, tmp_path):
    dataset, build = SETS[name]
    files, expected = build(tmp_path)
    made = make(dataset, files, tmp_path / "out")
    assert sorted(made) == sorted(expected)
    for path, content in expected.items():
        if isinstance(content, bytes):
            assert made[path] == content, path
        else:
            assert (np.asarray(Image.open(io.BytesIO(made[path]))) == content).all(), path
    done = json.loads((tmp_path / "out" / archives.DONE).read_text())
    assert sum(done["pictures"].values()) == len(expected) and done["data"] == dataset.name
    splits = {path.partition("/")[0] for path in expected} & {"train", "val"}
    for split in splits or {None}:
        seen = open_catalog(tmp_path / "out", split)
        assert seen.n == sum(1 for path in expected if path.startswith(split or "")) and (seen.labels >= 0).all()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- bad files


@pytest.fixture
def food(tmp_path):
    return of_food101(tmp_path)[0][0]


def refused(dataset, files, out, *parts):
    with pytest.raises(UserError) as caught:
        archives.make(dataset, files, out)
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message and message.isprintable(), message
    assert not out.exists() and not [*out.parent.glob(".*.partial")]


def test_a_file_that_is_not_the_published_one(food, tmp_path):
    digest = hashlib.md5(food.read_bytes()).hexdigest()
    expected = food101.FOOD101.archives["food-101.tar.gz"]
    refused(food101.FOOD101, [food], tmp_path / "out", str(food), digest, expected, "food-101.tar.gz")
    refused(food101.FOOD101, [tmp_path / "none"], tmp_path / "out", "none: cannot be read", "food-101.tar.gz")
    refused(food101.FOOD101, [tmp_path], tmp_path / "out", "cannot be read")


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_a_truncated_tar(food, tmp_path, share, mode):
    with tarfile.open(food) as archive:
        members = {each.name: archive.extractfile(each).read() for each in archive}
    whole = tar(tmp_path / "whole", dict(sorted(members.items(), key=lambda each: "waffles/4" in each[0])), mode)
    cut = whole.read_bytes()
    end = len(cut) if mode == "w:gz" else cut.index(picture(4)) + len(picture(4))  # a plain tar ends in zeros
    whole.write_bytes(cut[: int(share * end)])
    refused(as_published(food101.FOOD101, [whole]), [whole], tmp_path / "out", str(whole))


@pytest.mark.parametrize("name", ["../evil.jpg", "/tmp/evil.jpg", "food-101/images/../../../evil.jpg"])
def test_a_member_that_leads_out(tmp_path, name):
    bad = tar(tmp_path / "a.tar.gz", {name: picture(0)})
    refused(as_published(food101.FOOD101, [bad]), [bad], tmp_path / "out", repr(name), "leads out")
    assert not [*tmp_path.parent.glob("evil.jpg")] and not Path("/tmp/evil.jpg").exists()


def test_a_class_that_leads_out(tmp_path):
    """Names of classes come out of the lists: a made-up list does not write elsewhere either."""
    top = "fgvc-aircraft-2013b/data"
    members = {
        f"{top}/images_variant_trainval.txt": b"1 ../../evil\n2 ..\n",
        f"{top}/images_variant_test.txt": b"3 .x\n",
    }
    bad = tar(tmp_path / "a.tar.gz", members | {f"{top}/images/{k}.jpg": picture(k) for k in (1, 2, 3)})
    assert sorted(make(aircraft.AIRCRAFT, [bad], tmp_path / "out")) == [
        "train/_./2.jpg",
        "train/_._.._evil/1.jpg",
        "val/_x/3.jpg",
    ]


def test_a_picture_that_is_a_link_counts_as_missing(food, tmp_path):
    with tarfile.open(food) as archive:
        members = {each.name: archive.extractfile(each).read() for each in archive}
    del members["food-101/images/waffles/3.jpg"]
    linked = tar(tmp_path / "b.tar.gz", members)
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("food-101/images/waffles/3.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    for bad in (linked, tmp_path / "c.tar"):
        refused(as_published(food101.FOOD101, [bad]), [bad], tmp_path / "out", "lacks food-101/images/waffles/3.jpg")


def test_lists_that_are_missing_and_classes_that_are_one(tmp_path):
    bad = tar(tmp_path / "a.tar.gz", {"food-101/meta/train.txt": b"a/1\n"})
    refused(as_published(food101.FOOD101, [bad]), [bad], tmp_path / "out", "holds no food-101/meta/test.txt")
    lists = {"food-101/meta/train.txt": b"a\\b/1\na_b/2\n", "food-101/meta/test.txt": b"a_b/3\n"}
    images = {f"food-101/images/{name}.jpg": picture(0) for name in ("a\\b/1", "a_b/2", "a_b/3")}
    bad = tar(tmp_path / "b.tar.gz", lists | images)
    refused(as_published(food101.FOOD101, [bad]), [bad], tmp_path / "out", "have one folder name")
    broken = {"food-101/meta/train.txt": b"a/1\n", "food-101/meta/test.txt": b"", "food-101/images/a/1.jpg": b"text"}
    bad = tar(tmp_path / "c.tar.gz", broken)
    refused(as_published(food101.FOOD101, [bad]), [bad], tmp_path / "out", "a/1: is no picture")


def test_tables_that_are_no_tables(tmp_path):
    files, _ = of_cifar10(tmp_path)
    with tarfile.open(files[0]) as archive:
        members = {each.name: archive.extractfile(each).read() for each in archive}
    for change in (lambda table: table[:-1], lambda table: b"\x09" + table[1:], lambda table: b""):
        name = "cifar-10-batches-bin/data_batch_2.bin"
        bad = tar(tmp_path / "bad.tar.gz", members | {name: change(members[name])})
        refused(as_published(cifar10.CIFAR10, [bad]), [bad], tmp_path / "out", "data_batch_2.bin is no table")
    files, _ = of_flowers102(tmp_path)
    files[1].write_bytes(b"text")
    refused(as_published(flowers102.FLOWERS102, files), files, tmp_path / "out", "is no MATLAB file with labels")


# --- again


def test_again_and_after_a_kill(food, tmp_path, capsys):
    dataset, out = as_published(food101.FOOD101, [food]), tmp_path / "out"

    def killed(files):
        number, pictures = food101.pictures(files)
        yield number
        for at, each in enumerate(pictures):
            if at == 2:
                raise KeyboardInterrupt
            yield each

    def cut(files):
        steps = killed(files)
        return next(steps), steps

    with pytest.raises(KeyboardInterrupt):
        archives.make(dataset._replace(pictures=cut), [food], out)
    [partial] = tmp_path.glob(".out.*.partial")
    begun = {path: path.stat().st_mtime_ns for path in partial.rglob("*.jpg")}
    assert len(begun) == 2 and not out.exists()
    archives.make(dataset, [food], out)
    for path, when in begun.items():
        assert (out / path.relative_to(partial)).stat().st_mtime_ns == when
    assert len(found(out)) == 5
    capsys.readouterr()
    archives.make(dataset, [food], out)
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        archives.make(dataset, [food], tmp_path / "other")


def test_as_a_user_starts_it(food, tmp_path):
    line = [sys.executable, DATA / "food101.py", food]
    done = subprocess.run([*line, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("food101.py: error: ") and "MD5" in done.stderr
    done = subprocess.run([sys.executable, DATA / "cars.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in cars.CARS.archives)
