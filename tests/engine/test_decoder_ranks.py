"""A decoder on a frozen encoder on two ranks: it learns as in a plain loop, and the encoder costs its forward only."""

import decoder_ranks as made
import pytest
import tiny
import torch
from conftest import ran
from safetensors.torch import load_file

from mage_ds import keyed
from mage_ds.models import Decoder

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, me):
    folder = tmp_path_factory.mktemp("decoder_ranks")
    return folder, ran(folder, 2, script="decoder_ranks.py")


@pytest.fixture(scope="module")
def decoder():
    numbers = made.numbers_of().model
    sizes = numbers.model_dump(include={"decoder", "tokens", "vocabulary", "dropout", "padding", "classes"})
    return Decoder(width=numbers.encoder.width, **sizes)


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("stage", ["1", "3"])
def test_it_equals_the_plain_loop(ranks, decoder, stage):
    numbers = made.numbers_of()
    encoder, withheld = made.encoder_of(numbers), []

    def logits_of(model, batch, tokens, masked, keep):
        labels = batch.labels.clone()
        for i, (index, epoch) in enumerate(zip(batch.index, batch.epoch, strict=True)):
            if keyed.uniform(numbers.seed, "label", [index], epoch).item() < 0.3:
                labels[i] = -1
        withheld.append((labels != batch.labels).float().mean().item())
        with torch.no_grad():
            x = encoder(tokens, masked, keep)
        return model(x, masked, keep, encoder.token_emb.word_embeddings.weight[: tiny.CODES], labels)

    plain = tiny.plain(numbers, made.STEPS, model=decoder, batch_of=made.batch_at, logits_of=logits_of)
    assert 0.1 < sum(withheld) / len(withheld) < 0.5
    assert plain[-1] < plain[0] - 0.02  # it learns: a wrong update would show
    first, second = (rank[stage]["losses"] for rank in ranks[1])
    assert first == second and tiny.worst(first, plain) < 1e-6


@pytest.mark.parametrize("stage", ["1", "3"])
def test_the_encoder_has_no_gradient_no_optimizer_and_no_communication(ranks, decoder, stage):
    encoder = made.encoder_of(made.numbers_of())
    assert count(encoder) > 8 * count(decoder)
    for rank in ranks[1]:
        seen = rank[stage]
        assert not seen["encoder changed"] and seen["encoder gradients"] == 0
        assert seen["in the engine"] == count(decoder)
    moments = sum(rank[stage]["moments"] for rank in ranks[1])
    assert count(decoder) <= moments <= count(decoder) + 8  # shards are padded
    for rank in ranks[1]:
        assert 0 < rank[stage]["largest sent"] <= count(decoder) + 8
        assert count(decoder) * made.STEPS < rank[stage]["sent"] < count(encoder) * made.STEPS


@pytest.mark.parametrize("stage", ["1", "3"])
def test_a_checkpoint_holds_the_decoder_alone(ranks, decoder, stage):
    folder = ranks[0] / f"run_{stage}" / "checkpoints" / f"step_{made.STEPS:06d}"
    files = sorted(folder.glob("*.safetensors"))
    kinds = {file.name.rpartition(".0")[0] for file in files}
    assert kinds == {f"decoder.{kind}" for kind in ("weight", "exp_avg", "exp_avg_sq")}
    shapes = {name: value.shape for name, value in decoder.state_dict().items()}
    for kind in kinds:
        tensors = {name: t.shape for f in folder.glob(f"{kind}.0*") for name, t in load_file(f).items()}
        assert tensors == shapes
