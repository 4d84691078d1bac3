"""What is done to a model from outside: initial values, recomputed and compiled blocks; parameters keep their names."""

from functools import partial

import pytest
import tiny
import torch

from mage_ds.engine import wrap
from mage_ds.models import Mage, Vqgan


def weights(numbers, seed: int = 0) -> dict[str, torch.Tensor]:
    model = Mage(**numbers.model.model_dump())
    wrap.initialize_weights(model, seed)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_initial_values_are_functions_of_seed_and_name():
    torch.manual_seed(1)
    one = weights(tiny.recipe())
    torch.manual_seed(2)
    torch.rand(10)
    assert tiny.equal(one, weights(tiny.recipe()))
    drawn = [name for name, value in one.items() if value.std() > 0]
    other = weights(tiny.recipe(), seed=1)
    assert len(drawn) > 15 and not any(torch.equal(one[name], other[name]) for name in drawn)


def test_other_parts_of_a_model_do_not_change_a_value():
    one = weights(tiny.recipe())
    deeper = weights(tiny.recipe("model.decoder={depth: 3, width: 10, heads: 2}", "model.padding=mask"))
    assert set(one) < set(deeper)
    assert all(torch.equal(one[name], deeper[name]) for name in one)
    wider = weights(tiny.recipe("model.decoder={depth: 1, width: 12, heads: 2}"))
    same = [name for name in one if name.startswith(("blocks", "token_emb", "norm"))]
    assert same and all(torch.equal(one[name], wider[name]) for name in same)


def test_two_layers_of_one_shape_differ():
    one = weights(tiny.recipe())
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], one["blocks.1.attn.qkv.weight"])


def test_the_order_of_initialisation_does_not_matter():
    class Reversed(Mage):
        def named_parameters(self, *args, **kwargs):
            return reversed(list(super().named_parameters(*args, **kwargs)))

    model = Reversed(**tiny.recipe().model.model_dump())
    wrap.initialize_weights(model, 0)
    assert tiny.equal({name: p.detach() for name, p in model.named_parameters()}, weights(tiny.recipe()))


@pytest.mark.parametrize(("which", "stage"), [("full", 1), ("selective", 1), ("full", 3)])
def test_recomputed_blocks_change_nothing(me, which, stage):
    plain, full = tiny.recipe(), tiny.recipe(f"machine.activation_checkpointing={which}")
    assert plain.model.dropout > 0
    engine = tiny.engine_of(full, stage)
    seen = recomputed(engine.module)
    losses = tiny.train(engine, full, 10).losses
    assert tiny.worst(losses, tiny.train(tiny.engine_of(plain, stage), plain, 10).losses) < 1e-6
    assert seen["calls"] == 2 * 2 * 10  # two micro-batches a step; each once forward and once again in backward
    names = [name for name, _ in Mage(**plain.model.model_dump()).named_parameters()]
    assert [name for name, _ in engine.module.named_parameters()] == names


def recomputed(model) -> dict:
    """Counts calls of the first block's attention."""
    seen = {"calls": 0}
    model.blocks[0].attn.register_forward_hook(lambda *_: seen.update(calls=seen["calls"] + 1))
    return seen


def test_recomputed_blocks_keep_less(me):
    """Of a block only its input is kept for backward."""
    kept = {}
    for mode in ("none", "selective", "full"):
        numbers = tiny.recipe(
            f"machine.activation_checkpointing={mode}", "model.encoder={depth: 8, width: 15, heads: 3}"
        )
        engine, sizes = tiny.engine_of(numbers, 1), []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t)
        with hooks:
            batch = tiny.batch_at(torch.arange(4).numpy())
            ((_, loss, _),) = tiny.pretrain.step_fn({"mage": engine}, batch, 0, recipe=numbers, tokenize=tiny.tokenize)
        kept[mode] = sum(sizes)
        engine.backward(loss)
    assert kept["full"] < 0.4 * kept["none"]
    # 5 of 9 blocks: every second one of encoder and decoder, from the first on
    assert kept["selective"] == pytest.approx((5 * kept["full"] + 4 * kept["none"]) / 9, rel=0.1)


def test_the_tokenizer_is_recomputed_too(me):
    gradients = {}
    for mode in ("none", "full"):
        numbers = tiny.recipe(f"machine.activation_checkpointing={mode}", "machine.micro_batch=8")
        model = Vqgan(**numbers.tokenizer.model_dump())
        wrap.initialize_weights(model, 0)
        engine = wrap.wrap(model, numbers, tiny.config_of(numbers, 0), me.device)
        drawn, _, codebook, commitment = engine(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        engine.backward(drawn.abs().mean() + codebook.mean() + commitment.mean())
        gradients[mode] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["none"].keys() == gradients["full"].keys() and len(gradients["none"]) > 20
    assert all(torch.allclose(gradients["none"][n], gradients["full"][n], rtol=1e-5) for n in gradients["none"])


def compiled_losses(numbers, stage: int):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine = tiny.engine_of(numbers, stage)
    losses = tiny.train(engine, numbers, 4).losses
    names = [name for name, _ in engine.module.named_parameters()]
    return losses, names, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("checkpointing", "stage"),
    [("full", 1), *(pytest.param(*case, marks=pytest.mark.full) for case in (("none", 1), ("none", 3), ("full", 3)))],
)
def test_blocks_are_compiled(me, monkeypatch, checkpointing, stage):
    """Traced by the compiler, but run as they are: code generation takes minutes on a small machine."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = tiny.recipe()
    numbers = tiny.recipe("machine.compile=true", f"machine.activation_checkpointing={checkpointing}")
    losses, names, graphs = compiled_losses(numbers, stage)
    assert graphs >= 2  # encoder and decoder blocks
    assert tiny.worst(losses, tiny.train(tiny.engine_of(plain, stage), plain, 4).losses) < 1e-6
    assert names == [name for name, _ in Mage(**plain.model.model_dump()).named_parameters()]


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_generated_code_draws_the_same_dropout(me, stage, checkpointing):
    plain = tiny.recipe()
    numbers = tiny.recipe("machine.compile=true", f"machine.activation_checkpointing={checkpointing}")
    losses, _, graphs = compiled_losses(numbers, stage)
    assert graphs >= 2
    assert tiny.worst(losses, tiny.train(tiny.engine_of(plain, stage), plain, 4).losses) < 1e-5


def test_the_micro_batch_does_not_change_the_losses_without_dropout(me):
    def losses(micro):
        numbers = tiny.recipe("model.dropout=0.0", f"machine.micro_batch={micro}")
        return tiny.train(tiny.engine_of(numbers, 1), numbers, 20).losses

    whole = losses(8)
    assert tiny.worst(losses(4), whole) < 1e-5
    assert tiny.worst(losses(2), whole) < 1e-5
