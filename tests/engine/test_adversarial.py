"""A tokenizer and its discriminator as two engines, against a plain loop in one process that asks autograd directly."""

import json

import adversarial_ranks as made
import numpy as np
import pytest
import tiny
import torch
from conftest import ran

from mage_ds.engine import wrap
from mage_ds.engine.adversarial import LastLayer
from mage_ds.models import Vqgan

MODE_NAMES = [f"{stage} {precision}" for stage, precision in made.MODES]


def plain(numbers, world: int, dtype: torch.dtype) -> tuple[list[dict], dict]:
    """Figures of each step and the weights after the last: no engine, one process, the joined micro-batches of
    `world` ranks; forward in `dtype`, gradients and weights kept in float32."""
    vqgan, critic, lpips = Vqgan(**numbers.model.model_dump()), made.critic_of(numbers), made.Distance()
    for model in (vqgan, critic):
        wrap.initialize_weights(model, numbers.seed)
    masters = [[p.detach().clone() for p in model.parameters()] for model in (vqgan, critic)]
    settings = {"lr": numbers.effective_lr(), "betas": (0.5, 0.9), "eps": 1e-2}
    optimizers = [torch.optim.Adam(values, **settings) for values in masters]
    for model in (vqgan, critic):
        model.to(dtype)
    size = numbers.machine.micro_batch * world
    pieces, rows = numbers.batch // size, []
    for step in range(made.STEPS):
        sums, plays = {}, step >= made.START
        for piece in range(pieces):
            positions = step * numbers.batch + piece * size + np.arange(size)
            x = made.images_at(positions) / 255
            valid = torch.tensor([float(p % 11 != 5) for p in positions])
            drawn, _, near, commitment = vqgan(x.to(dtype))
            drawn = drawn.float()
            l1 = (drawn - x).abs().flatten(1).mean(1)
            picture = ((l1 + 0.5 * lpips(x, drawn)) * valid).mean()
            codes = ((near + 0.25 * commitment) * valid).mean()
            logs, loss = {"loss": picture + codes, "l1": (l1 * valid).mean()}, picture + codes
            if plays:
                critic.requires_grad_(False)
                adversarial = -(critic(drawn.to(dtype)).float().flatten(1).mean(1) * valid).mean()
                critic.requires_grad_(True)
                last = vqgan.decoder.conv_out.weight
                norms = [torch.autograd.grad(each, last, retain_graph=True)[0] for each in (picture, adversarial)]
                norms = [each.float().norm() for each in norms]
                weight = 0.8 * (norms[0] / (norms[1] + 1e-4)).clamp(max=100.0)
                loss = loss + weight.detach() * adversarial
                logs |= {"adversarial": adversarial, "adaptive_weight": weight}
                logs |= {"reconstruction_norm": norms[0], "adversarial_norm": norms[1]}
            (loss / pieces).backward()
            if plays:
                real, fake = (critic(each.to(dtype)).float().flatten(1) for each in (x, drawn.detach()))
                hinge = (1 - real).clamp(min=0).mean(1) + (1 + fake).clamp(min=0).mean(1)
                judged = (0.5 * hinge * valid).mean()
                (judged / pieces).backward()
                logs |= {"discriminator_loss": judged, "real_logit": (real.mean(1) * valid).mean()}
                logs |= {"fake_logit": (fake.mean(1) * valid).mean()}
            sums = {key: sums.get(key, 0) + float(value.detach()) / pieces for key, value in logs.items()}
            _keep_gradients((vqgan, critic)[: 1 + plays], masters)
        rows.append(sums)
        for model, values, optimizer in list(zip((vqgan, critic), masters, optimizers, strict=True))[: 1 + plays]:
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), values, strict=True):
                    parameter.copy_(value)
    weights = {f"tokenizer weight {name}": p.detach() for name, p in vqgan.named_parameters()}
    weights |= {f"discriminator weight {name}": p.detach() for name, p in critic.named_parameters()}
    return rows, weights


def _keep_gradients(models, masters) -> None:
    """Add the models' gradients to those of their float32 masters."""
    for model, values in zip(models, masters, strict=False):
        for parameter, value in zip(model.parameters(), values, strict=True):
            value.grad = parameter.grad.float() + (0 if value.grad is None else value.grad)
        model.zero_grad()


WORLDS = [pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.processes)]


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, me, tmp_path_factory):
    """(world, folder, what each rank saw): one rank is this process."""
    world, folder = request.param, tmp_path_factory.mktemp("adversarial")
    if world == 1:
        return 1, folder, [json.loads(json.dumps({"modes": made.modes(me, folder)}))]
    return world, folder, ran(folder, world, script="adversarial_ranks.py")


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_engines_equal_a_plain_loop(ranks, mode):
    world, folder, seen = ranks
    numbers, exact = made.numbers_of(mode.split()[1]), "float32" in mode
    expected, weights = plain(numbers, world, torch.float32 if exact else torch.bfloat16)
    figures = seen[0]["modes"][mode]["figures"]
    for step, (one, other) in enumerate(zip(figures, expected, strict=True)):
        assert ("adversarial" in one) == (step >= made.START)
        # L1's gradient is a sign: where a rounding turns that of one pixel, a norm differs in its fourth digit.
        # In bf16 CPUs round otherwise, and each update of the discriminator doubles what comes of it.
        rel, off = (
            (1e-5 if step < made.START + 2 else 1e-3, 1e-6) if exact else (0.06 if step <= made.START else 0.15, 0.01)
        )
        for key, value in other.items():
            close = pytest.approx(value, rel=rel, abs=off)
            assert one[key] == close, (step, key)
    assert not exact or expected[-2]["loss"] < expected[0]["loss"]  # it learns: a wrong update would show
    assert all(rank["modes"][mode] == seen[0]["modes"][mode] for rank in seen)
    assert seen[0]["modes"][mode]["updates"] == {"tokenizer": made.STEPS, "discriminator": made.STEPS - made.START}
    if exact:
        ours = torch.load(folder / f"{mode}.pt")
        for name, value in weights.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["1 float32", pytest.param("2 bf16", marks=pytest.mark.full)])
def test_a_run_goes_on_exactly_before_at_and_after_the_start(ranks, me, tmp_path, mode):
    world, _, seen = ranks
    stage, precision = mode.split()
    if world == 1:
        seen = [json.loads(json.dumps({f"continued {mode}": made.continued(me, tmp_path, int(stage), precision)}))]
    elif mode == "2 bf16":
        seen = ran(tmp_path, world, mode, script="adversarial_ranks.py")
    for rank in seen:
        cases = rank[f"continued {mode}"]
        assert [cases[str(at)]["updates"]["discriminator"] for at in (1, 2, 4)] == [0, 0, 2]
        for case in cases.values():
            assert case["same"] and case["same end"]


def test_a_discriminator_that_is_not_finite_skips_its_own_step(ranks, me, tmp_path):
    world, _, seen = ranks
    if world == 1:
        seen = [json.loads(json.dumps({"poisoned": made.poisoned(me, tmp_path)}))]
    for rank in seen:
        for case in rank["poisoned"].values():
            assert case["skipped"] == 1  # and not one for each step before the start
            assert case["updates"] == {"tokenizer": made.STEPS, "discriminator": made.STEPS - made.START - 1}
            assert case["norms"] == [step >= made.START and step != made.START + 1 for step in range(made.STEPS)]


def test_the_last_layers_gradients_are_autograds(me):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(7, 3, 3, padding=1).double()
    layer, x = LastLayer(convolution), torch.randn(2, 7, 9, 8, dtype=torch.float64)
    picture = convolution(x)
    gradients = [torch.randn_like(picture) for _ in range(2)]
    ours = layer.gradients(*(each.float() for each in gradients))
    for one, gradient in zip(ours, gradients, strict=True):
        (expected,) = torch.autograd.grad(picture, convolution.weight, gradient, retain_graph=True)
        torch.testing.assert_close(one, expected.float(), rtol=1e-5, atol=1e-5)
    assert layer._input is None  # kept no longer than needed
    with torch.no_grad():
        convolution(x)
    assert layer._input is None


def test_an_exploding_ratio_is_clamped(me):
    numbers = made.recipe("adversary.most=0.5", "loss.perceptual=0.0", "adversary.start={steps: 0}")
    engines, step = made.opened(numbers, 1)
    run = made.train(engines, step, numbers, 1)
    assert run.figures[0]["adaptive_weight"] == pytest.approx(0.4)  # most x weight
    assert tiny.worst([run.figures[0]["tokenizer_lr"]], [numbers.effective_lr()]) == 0
