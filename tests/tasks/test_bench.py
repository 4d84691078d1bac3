"""`mage-ds bench scale`: what `plan` says, within 10 % of what a real step holds, kind by kind."""

import pytest
from launched import mage_ds

TINY = [
    "batch=8",
    "machine.micro_batch=4",
    "model.encoder={depth: 4, width: 128, heads: 4}",
    "model.decoder={depth: 2, width: 128, heads: 4}",
]


def rows(stdout: str) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """(config, checkpointing) -> column -> (measured, planned) of the printed table."""
    lines = [line.strip("| ").split(" | ") for line in stdout.splitlines() if line.startswith("| ")]
    titles = lines[0][2:-2]
    found = {}
    for name, which, *cells in lines[1:]:
        pairs = [tuple(float(number.replace(",", "")) for number in cell.split(" / ")) for cell in cells[:-2]]
        found[name, which] = dict(zip(titles, pairs, strict=True))
    return found


def check(found: dict, smallest: float) -> None:
    """Within 10 %, kinds of less than `smallest` MiB aside (they are rounded, or a planned zero)."""
    for key, columns in found.items():
        assert list(columns) == ["weights", "gradients", "optimizer", "buffers", "activations", "peak"]
        for column, (measured, planned) in columns.items():
            if max(measured, planned) > smallest:
                assert measured == pytest.approx(planned, rel=0.1), (key, column)


def test_a_tiny_step(tmp_path):
    words = ["digits_mage", *TINY, "machine.precision=float32", "--stages", "1", "--checkpointing", "none,full"]
    found = rows(mage_ds("bench", "scale", *words, cwd=tmp_path).stdout)
    assert set(found) == {("zero1", "none"), ("zero1", "full")}
    check(found, smallest=0.5)
    assert found["zero1", "full"]["activations"][0] < found["zero1", "none"]["activations"][0] / 3


@pytest.mark.full
def test_a_tiny_step_of_a_decoder(tmp_path):
    words = [
        "digits_class_conditional",
        *TINY,
        "machine.precision=float32",
        "--stages",
        "1,3",
        "--checkpointing",
        "none",
    ]
    done = mage_ds("bench", "scale", *words, cwd=tmp_path)
    check(rows(done.stdout), smallest=0.5)
    lines = [line for line in done.stdout.splitlines() if ", beside these: " in line]
    assert [line.partition(",")[0] for line in lines] == ["encoder", "tokenizer"]
    for line in lines:
        for pair in line.split("weights ")[1].split(", forward "):
            measured, planned = map(float, pair.replace(",", "").split(" / "))
            assert measured == pytest.approx(planned, rel=0.1, abs=0.11)


@pytest.mark.full
def test_tiny_steps_in_every_stage(tmp_path):
    for precision, stages in (("float32", "0,1,2,3,2_offload,3_offload"), ("bf16", "1,2,3,2_offload,3_offload")):
        words = ["digits_mage", *TINY, f"machine.precision={precision}", "--stages", stages]
        check(rows(mage_ds("bench", "scale", *words, cwd=tmp_path).stdout), smallest=0.5)


@pytest.mark.full
def test_a_step_of_vit_base(tmp_path):
    words = ["pretrain_vit_base", "machine.micro_batch=2", "machine.precision=float32", "--stages", "1"]
    done = mage_ds("bench", "scale", *words, "--checkpointing", "none", cwd=tmp_path)
    check(rows(done.stdout), smallest=20)
    *_, tokenizer = done.stdout.splitlines()
    for pair in tokenizer.split("weights ")[1].split(", forward "):
        measured, planned = map(float, pair.replace(",", "").split(" / "))
        assert measured == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize(
    "words, said",
    [
        (["pretrain_vit_bas"], "pretrain_vit_base"),
        (["digits_mage", "--stages", "4"], "4: must be one of 0, 1"),
        (["digits_mage", "--checkpointing", "some"], "some: must be one of none"),
    ],
)
def test_bad_inputs(words, said, capsys):
    from mage_ds.cli import main

    assert main(["bench", "scale", *words]) == 2
    assert said in capsys.readouterr().err
