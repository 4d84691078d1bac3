"""quarantine.py: cheap looks at bytes, and the list that ranks share."""

import json
import threading

import pytest
from made_pictures import encode, picture
from PIL import Image

from mage_ds.errors import UserError
from mage_ds.inputs.quarantine import Quarantine, Unreadable, picture_size

JPEG = encode(picture(0, 40, 30), "JPEG")


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_the_upright_pictures(kind, orientation):
    data = encode(picture(0, 40, 30), kind, exif=exif(orientation))
    assert picture_size(data) == ((30, 40) if orientation > 4 else (40, 30))


def test_size_of_plain_formats_and_trailing_bytes():
    assert picture_size(encode(picture(0, 40, 30), "BMP")) == (40, 30)
    assert picture_size(JPEG + b"maker's notes \xff\xda") == (40, 30)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_matter():
    assert picture_size(encode(picture(0, 40, 30), "JPEG", exif=b"Exif\0\0II*\0garbage")) == (40, 30)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"just some text, nothing else", "starts with b'just som'"),
        (encode(picture(0, 40, 30), "GIF"), "starts with b'GIF8"),
        (JPEG[:-2], "truncated"),
        (JPEG[: len(JPEG) // 2], "header: Truncated"),
        (JPEG[:30], "header|starts with"),
        (encode(picture(0, 40, 30), "PNG")[:-30], "truncated"),
        (encode(picture(0, 40, 30), "WEBP")[:-30], "truncated|header|starts with"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(Unreadable, match=reason):
        picture_size(data)


def test_the_end_of_an_embedded_preview_is_not_the_end():
    preview = encode(picture(1, 8, 6), "JPEG")
    block = b"\xff\xe1" + (len(preview) + 8).to_bytes(2, "big") + b"Exif\0\0" + preview
    whole = JPEG[:2] + block + JPEG[2:]
    assert picture_size(whole) == (40, 30)
    with pytest.raises(Unreadable, match="truncated"):
        picture_size(whole[:-100])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_once_per_file(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 1.0, 10)
    for _ in range(3):
        quarantine.add("a.jpg", "empty file")
        quarantine.add('b "\n.jpg', "text")
    assert lines(path) == [{"name": "a.jpg", "reason": "empty file"}, {"name": 'b "\n.jpg', "reason": "text"}]
    assert quarantine.count == 2


def test_nothing_is_written_before_something_is_found(tmp_path):
    assert Quarantine(tmp_path / "q.jsonl", 0.0, 10).count == 0
    assert not (tmp_path / "q.jsonl").exists()


def test_ranks_and_later_processes_share_the_list(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    first, second = Quarantine(path, 1.0, 10), Quarantine(path, 1.0, 10)
    first.add("a", "x")
    second.add("b", "x")
    second.add("a", "x")
    first.add("b", "x")
    first.add("c", "x")
    assert [line["name"] for line in lines(path)] == ["a", "b", "c"]
    assert first.count == 3 and Quarantine(path, 1.0, 10).count == 3


def test_a_line_cut_off_by_a_crash_costs_only_itself(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"name": "a", "reason": "x"}\n{"name": "b", "rea')
    quarantine = Quarantine(path, 1.0, 10)
    quarantine.add("b", "x")
    quarantine.add("c", "x")
    good = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["name"] for line in good] == ["a", "b", "c"]
    assert Quarantine(path, 1.0, 10).count == 3


def test_many_threads(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    shared = [Quarantine(path, 1.0, 1000) for _ in range(2)]
    work = [threading.Thread(target=lambda q=q: [q.add(f"{i}", "x") for i in range(50)]) for q in shared * 2]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert sorted(int(line["name"]) for line in lines(path)) == list(range(50))


@pytest.mark.parametrize("named", [True, False])
def test_more_than_the_limit_stops(tmp_path, named):
    path = tmp_path / "quarantine.jsonl" if named else None
    quarantine = Quarantine(path, 0.02, 100)
    quarantine.add("a", "x")
    quarantine.add("b", "x")
    with pytest.raises(UserError, match=r"3 of 100 .*broken_limit=0.02") as error:
        quarantine.add("c", "x")
    assert "\n" not in str(error.value) and (not named or str(path) in str(error.value))
