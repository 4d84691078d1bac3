"""Use of the codebook against loops; dead codes in every stage and number format, on one rank and on two."""

import math

import codebook_ranks
import pytest
import tiny
import torch
from codebook_ranks import AFTER, CODES, DEAD, MODES, WIDTH
from conftest import ran
from scipy import stats

from mage_ds.engine import checkpoint, codebook

MODE_NAMES = [f"{stage} {precision}" for stage, precision in MODES]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codebook")
    return ran(folder, 2, script="codebook_ranks.py")


def loops(world: int) -> list:
    """What `counted` must find, counted one token after the other."""
    unused, expected = [0] * CODES, []
    for step in range(3):
        counts = [0] * CODES
        for rank in range(world):
            for micro in range(2):
                tokens, valid = codebook_ranks.tokens_of(rank, step, micro)
                for picture, row in enumerate(tokens.tolist()):
                    for code in row if valid is None or valid[picture] else []:
                        counts[code] += 1
        unused = [0 if counts[code] else unused[code] + 1 for code in range(CODES)]
        shares = [count / sum(counts) for count in counts if count]
        figures = {
            "usage": len(shares) / CODES,
            "perplexity": math.exp(-sum(share * math.log(share) for share in shares)),
            "dead_codes": CODES - len(shares),
        }
        expected.append([figures, unused])
    return expected


def compare_counted(told: list, world: int) -> None:
    for (figures, unused), (expected, expected_unused) in zip(told, loops(world), strict=True):
        assert figures == pytest.approx(expected, rel=1e-5)
        assert unused == expected_unused
    assert max(told[-1][1]) > 1


def test_use_is_counted_on_one_rank(me):
    compare_counted(codebook_ranks.counted(), 1)


@pytest.mark.processes
@pytest.mark.full
def test_use_is_counted_over_two_ranks(two_ranks):
    for told in two_ranks:
        compare_counted(told["counted"], 2)


def test_nothing_counted_is_no_number_divided_by_zero(me):
    usage = codebook.Usage(4, "cpu")
    usage.end_of_step()
    assert {key: float(value) for key, value in usage.figures().items()} == {
        "usage": 0,
        "perplexity": 1,
        "dead_codes": 4,
    }


def compare_reseeded(told: dict, world: int) -> None:
    assert told["count"] == len(DEAD)
    assert min(told["moments before"]) > 0 and told["moments of dead"] == [0, 0]
    assert told["others kept"] and told["there after a step"] and told["others moved"] and told["computes"]
    assert told["unused"] == [0 if code in DEAD else AFTER - 3 for code in range(CODES)]
    assert told["due"] == [3, 6]
    points = [[tuple(row) for row in codebook_ranks.points_of(rank)[0].tolist()] for rank in range(world)]
    rows = [tuple(row) for row in told["rows"]]
    assert len(set(rows)) == len(rows) and all(math.isfinite(value) for row in rows for value in row)
    for rank, shares in enumerate({1: [5], 2: [3, 2]}[world]):
        assert sum(row in points[rank] for row in rows) == shares, rank


@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_dead_codes_are_reseeded_in_the_master(me, stage, precision):
    compare_reseeded(codebook_ranks.reseeded(stage, precision), 1)


@pytest.mark.processes
@pytest.mark.full
@pytest.mark.parametrize("mode", MODE_NAMES)
def test_dead_codes_are_reseeded_on_two_ranks_alike(two_ranks, mode):
    first, second = (told[mode] for told in two_ranks)
    assert first == second
    compare_reseeded(first, 2)
    assert first["rows"] == two_ranks[0]["1 float32"]["rows"]  # nor does the stage or the number format matter


@pytest.fixture
def written(monkeypatch):
    """[(codes, rows)] instead of an engine that is written to."""
    calls = []
    monkeypatch.setattr(codebook, "_write", lambda engine, codes, rows: calls.append((codes.tolist(), rows)))
    return calls


def even(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return points, torch.ones(len(points))


def test_points_are_drawn_by_their_squared_distance(me, written):
    """One of four points, 4,000 times; the last lies on its code."""
    points, far = torch.arange(4.0)[:, None].expand(4, WIDTH), torch.tensor([1.0, 2.0, 5.0, 0.0])
    for step in range(4000):
        usage = codebook.Usage(CODES, "cpu")
        usage.unused[DEAD[0]] = 1
        codebook.reseed(None, usage, lambda: (points, far), 0, step, 1)
    counts = [sum(float(rows[0, 0]) == value for _, rows in written) for value in range(4)]
    assert counts[3] == 0
    assert stats.chisquare(counts[:3], [500, 1000, 2500]).pvalue > 1e-3


def test_the_draw_is_a_function_of_seed_and_step(me, written):
    for seed, step in ((1, 3), (1, 3), (2, 3), (1, 4)):
        usage = codebook.Usage(CODES, "cpu")
        usage.unused[DEAD] = 1
        codebook.reseed(None, usage, lambda: codebook_ranks.points_of(0), seed, step, 1)
    first, again, other_seed, other_step = (rows for _, rows in written)
    assert torch.equal(first, again)
    assert not torch.equal(first, other_seed) and not torch.equal(first, other_step)


def test_too_few_points_leave_codes_for_the_next_step(me, written):
    usage = codebook.Usage(CODES, "cpu")
    usage.unused[DEAD] = 4
    counts = [codebook.reseed(None, usage, lambda: even(torch.ones(3, WIDTH)), 0, step, 4) for step in (8, 9, 10)]
    assert counts == [3, 2, 0]
    assert [codes for codes, _ in written] == [DEAD[:3], DEAD[3:]]


def test_points_without_a_number_are_no_codes(me, written):
    usage = codebook.Usage(CODES, "cpu")
    usage.unused[DEAD] = 4
    assert codebook.reseed(None, usage, lambda: even(torch.full((9, WIDTH), torch.nan)), 0, 8, 4) == 0
    assert usage.unused[DEAD].tolist() == [4] * len(DEAD)


def test_the_host_looks_rarely_and_misses_nothing(me, written):
    """Against a loop that looks after every step. At step 40 a run goes back to step 20."""
    asked, after = [], 6
    usage, plain = codebook.Usage(CODES, "cpu"), [0] * CODES
    generator, kept = torch.Generator().manual_seed(0), None
    for step in [*range(40), *range(20, 60)]:
        if step == 20 and kept:
            usage.unused.copy_(torch.tensor(kept))  # as a checkpoint is read
            plain = list(kept)
        usage.add(torch.randint(0, CODES, (1, 4), generator=generator))
        usage.end_of_step()
        plain = [0 if used else unused + 1 for unused, used in zip(plain, usage._totals.tolist(), strict=True)]
        asked.append(not usage.looked <= step < usage.due)
        before = len(written)
        codebook.reseed(None, usage, lambda: even(torch.ones(CODES, WIDTH)), 0, step, after)
        dead = [code for code in range(CODES) if plain[code] >= after]
        assert [codes for codes, _ in written[before:]] == ([dead] if dead else [])
        plain = [0 if code in dead else unused for code, unused in enumerate(plain)]
        assert usage.unused.tolist() == plain
        kept = list(plain) if step == 19 else kept
    assert len(written) > 10 and not all(asked)


def test_checkpoints_hold_the_counter_beside_the_published_names(me, tmp_path):
    usage, again = codebook.Usage(CODES, "cpu"), codebook.Usage(CODES, "cpu")
    engine = codebook_ranks.engine_of(1, "float32", usage, whole=True)
    codebook_ranks.train_step(engine, 0)
    usage.unused.copy_(torch.arange(CODES))
    names = engine.module.state_dict().keys()
    assert [name for name in names if name.startswith("quantize")] == ["quantize.embedding.weight"]
    checkpoint.save(tmp_path, 1, {"tokenizer": engine}, {}, keep=1)
    other = codebook_ranks.engine_of(1, "float32", again, whole=True)
    checkpoint.load(checkpoint.find(tmp_path), {"tokenizer": other})
    assert again.unused.tolist() == other.module.quantize.unused.tolist() == list(range(CODES))
    assert tiny.equal(tiny.full_state(other), tiny.full_state(engine))
    weights, _ = checkpoint.load_weights(tmp_path, "tokenizer")
    assert weights.keys() == names
