"""LARS and the average of the weights on two ranks, against their formulas in float64."""

import pytest
import tiny
import torch
from conftest import ran
from optimizer_ranks import LARS, LAYERED, LAYERS

from mage_ds.engine import checkpoint, ds_config, state, wrap
from mage_ds.errors import UserError
from mage_ds.models import Mage
from mage_ds.tasks import pretrain

pytestmark = pytest.mark.processes
MODES = ["0 float32", "1 float32", "2 float32", "3 float32", "1 bf16", "2 bf16", "3 bf16"]
DECAY = 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def ranks(folder, me):
    return ran(folder, 2, script="optimizer_ranks.py")


@pytest.mark.parametrize("mode", MODES)
def test_the_average_is_the_formulas_in_every_stage_and_after_a_move(ranks, mode):
    for rank in ranks:
        found = rank[mode]
        assert found["moved"] == 0  # as it was saved
        assert found["formula"] < 1e-6
        assert found["far"] > 1e-3  # it is another thing than the weights


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_shows_the_average_for_a_while_and_is_as_before(ranks, mode):
    for rank in ranks:
        found = rank[mode]
        exact = "float32" in mode
        assert found["inside"] < (1e-5 if exact else 0.05)
        assert found["outside"] > 1e-3
        assert found["undisturbed"]
        kept, moved = found["losses"]
        assert tiny.worst(kept, moved) < (1e-6 if exact else 2e-3)


@pytest.mark.parametrize("mode", ["1 float32", "3 float32"])
def test_one_rank_goes_on_with_the_average_of_two(ranks, folder, mode):
    numbers = tiny.recipe("batch=16", f"optimizer.ema={DECAY}", "warmup.steps=0", "optimizer.min_lr=0.01")
    engine = tiny.engine_of(numbers, 2)
    source = checkpoint.find(folder / mode)
    checkpoint.load(source, {"mage": engine})
    stored = tiny.stored_state(source)
    before = {name: state.get_full(engine, p, "ema").clone() for name, p in state.parameters(engine).items()}
    assert all(torch.equal(value, stored[f"ema {name}"]) for name, value in before.items())
    tiny.train(engine, numbers, 7, tiny.Recorder(numbers, 6))
    for name, parameter in state.parameters(engine).items():
        now = DECAY * before[name].double() + (1 - DECAY) * state.get_full(engine, parameter).double()
        torch.testing.assert_close(state.get_full(engine, parameter, "ema").double(), now, rtol=0, atol=1e-6)


def test_a_skipped_step_does_not_move_it(ranks):
    for rank in ranks:
        assert rank["skipped"]["formula"] < 1e-6


def test_weights_are_read_averaged_or_raw(ranks, folder):
    raw, _ = checkpoint.load_weights(folder / "1 float32", "mage", weights="raw")
    average, _ = checkpoint.load_weights(folder / "1 float32", "mage", weights="ema")
    default, _ = checkpoint.load_weights(folder / "1 float32", "mage")
    assert raw.keys() == average.keys() == default.keys()
    assert all(torch.equal(default[name], average[name]) for name in raw)
    assert max(float((raw[name] - average[name]).abs().max()) for name in raw) > 1e-3
    with pytest.raises(UserError, match=r"--weights ema: .* holds no average"):
        checkpoint.load_weights(folder / "lars", "mage", weights="ema")


# --- layer-wise learning rates


def by_layers(numbers, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the weights in the end, of torch's AdamW with a group for every parameter; one process."""
    model = Mage(**numbers.model.model_dump())
    wrap.initialize_weights(model, numbers.seed)
    wanted, groups = numbers.optimizer, []
    for name, p in model.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 3 if name.startswith("norm.") else 0
        decay = 0.0 if p.ndim == 1 or name.endswith(".bias") else wanted.weight_decay
        groups.append({"params": [p], "weight_decay": decay, "share": 0.5 ** (3 - layer)})
    adam = torch.optim.AdamW(groups, betas=tuple(wanted.betas), eps=wanted.eps, foreach=False)
    losses = []
    for step in range(steps):
        batch = tiny.batch_at(step * numbers.batch + torch.arange(numbers.batch).numpy())
        ((_, loss, _),) = pretrain.step_fn({"mage": model}, batch, step, recipe=numbers, tokenize=tiny.tokenize)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), wanted.clip)
        for group in adam.param_groups:
            group["lr"] = group["share"] * tiny.schedule_of(numbers)(step)
        adam.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def expected(ranks, me):
    return by_layers(tiny.recipe(*LAYERS), 4)


@pytest.mark.parametrize("mode", LAYERED)
def test_layers_have_their_rates_in_every_stage_and_after_a_move(ranks, folder, expected, mode):
    losses, weights = expected
    exact = "float32" in mode
    for rank in ranks:
        found = rank[f"layers {mode}"]
        assert tiny.worst(found["losses"], losses) < (1e-6 if exact else 5e-3)
        assert tiny.worst(found["losses"][2:], found["again"]) < (1e-6 if exact else 2e-3)
    kept, _ = checkpoint.load_weights(folder / f"layers {mode}", "mage")
    worst = max(float((kept[name] - value).abs().max()) for name, value in weights.items())
    assert worst < (1e-6 if exact else 1e-2), worst


# --- LARS


def by_formula(numbers, steps: int) -> list[dict[str, torch.Tensor]]:
    """Weights after each update: mu = 0.9 mu + trust ||p|| / ||g|| g, p -= lr mu; in one dimension no ratio."""
    model = Mage(**numbers.model.model_dump())
    wrap.initialize_weights(model, numbers.seed)
    velocity = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    series, micro = [], numbers.machine.micro_batch
    for step in range(steps):
        model.zero_grad()
        for g in range(numbers.batch // micro):
            torch.manual_seed(tiny.keyed.seed_of(numbers.seed, "dropout", step, g))
            batch = tiny.batch_at(step * numbers.batch + g * micro + torch.arange(micro).numpy())
            one = pretrain.step_fn({"mage": model}, batch, step, recipe=numbers, tokenize=tiny.tokenize)
            ((_, loss, _),) = one
            (loss * micro / numbers.batch).backward()
        lr = tiny.schedule_of(numbers)(step)
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient, weight = p.grad.double(), p.double()
                if p.ndim > 1 and not name.endswith(".bias"):
                    norms = float(weight.norm()), float(gradient.norm())
                    gradient = gradient * (0.001 * norms[0] / norms[1] if min(norms) > 0 else 1.0)
                velocity[name] = 0.9 * velocity[name] + gradient
                p.copy_(weight - lr * velocity[name])
        series.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return series


def test_lars_is_its_formula(ranks, folder):
    expected = by_formula(tiny.recipe(*LARS), 4)
    found = torch.load(folder / "lars_0.pt", weights_only=True)
    for name, value in expected[-1].items():
        torch.testing.assert_close(found[4][name], value, rtol=0, atol=3e-6)
    start = found[0]["decoder_embed.weight"]
    assert float((found[4]["decoder_embed.weight"] - start).abs().max()) > 1e-5  # it moves: a wrong ratio would show


def test_lars_goes_on_as_if_it_had_not_ended(ranks):
    for rank in ranks:
        assert rank["lars"]["rest"] == rank["lars"]["losses"][2:]
        assert rank["lars"]["same end"] == 0


def test_lars_refuses_shards_and_bf16():
    numbers, cpu = tiny.recipe(*LARS), torch.device("cpu")
    path, config = ds_config.read("zero1")
    with pytest.raises(UserError, match=r"zero1.json: zero_optimization.stage = 1: .*choose --deepspeed_config zero0"):
        ds_config.check_norms(path, config, numbers)
    with pytest.raises(UserError, match=r"--precision bf16: optimizer.name = lars needs .* leave it out"):
        ds_config.choose_precision("bf16", cpu, numbers)
    assert ds_config.default(numbers) == "zero0"
    assert ds_config.choose_precision("auto", cpu, numbers) == "float32"
    ds_config.check_norms(path, ds_config.read("zero0")[1], numbers)
    ds_config.check_norms(path, config, tiny.recipe())
