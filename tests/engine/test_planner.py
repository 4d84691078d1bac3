"""Operations and memory of an image, against counts by hand and the published figures."""

import psutil
import pytest
import torch

from mage_ds import recipes
from mage_ds.engine import made, memory, planner, wrap
from mage_ds.models import Mage, Vqgan
from mage_ds.models.masking import masks


def outline(numbers):
    with torch.device("meta"):
        return Mage(**numbers.model.model_dump())


def block_flops(length: int, width: int) -> int:
    """qkv, projection and MLP have 12 width^2 weights; queries times keys and weights times values."""
    return 2 * length * 12 * width**2 + 2 * 2 * length**2 * width


def test_forward_flops_of_a_product():
    a, b = torch.ones(3, 5, device="meta"), torch.ones(5, 7, device="meta")
    assert planner.forward_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_flops_of_vit_base():
    numbers = recipes.load_recipe("pretrain_vit_base", ["model.vocabulary=2025"])
    forward = planner.forward_flops(
        lambda: made.mage_on_made_inputs(numbers, outline(numbers), 1, torch.float32, "meta")
    )
    encoder, decoder = numbers.model.encoder, numbers.model.decoder
    by_hand = encoder.depth * block_flops(129, encoder.width) + decoder.depth * block_flops(257, decoder.width)
    by_hand += 2 * 129 * encoder.width * decoder.width  # into the decoder
    by_hand += 2 * 256 * decoder.width * encoder.width + 2 * 256 * encoder.width * 1024  # the head, over the codes
    assert forward == pytest.approx(by_hand, rel=1e-3)
    # Counted on the published code, whose head predicts all 2025 words at 257 places; backward is twice forward.
    published_head = 2 * 257 * encoder.width * 2025 - 2 * 256 * encoder.width * 1024
    assert forward + published_head == pytest.approx(54.5e9, rel=0.005)
    assert 3 * (forward + published_head) == pytest.approx(162.7e9, rel=0.01)


def test_flops_of_the_tokenizer():
    numbers = recipes.load_recipe("pretrain_vit_base")
    with torch.device("meta"):
        vqgan = Vqgan(**numbers.tokenizer.model_dump())
    picture = torch.zeros(1, 3, 256, 256, device="meta")
    assert planner.forward_flops(lambda: vqgan.encode(picture)) == pytest.approx(128.8e9, rel=0.01)


def test_a_training_step_counts_forward_backward_and_tokenizer():
    numbers = recipes.load_recipe("pretrain_vit_base", ["model.vocabulary=2025"])
    step = planner.flops_per_image(numbers)
    assert step == pytest.approx(162.7e9 + 128.8e9, rel=0.01)


def kept(numbers, batch: int = 1) -> int:
    model = outline(numbers)
    tokens = torch.zeros(batch, numbers.model.tokens, dtype=torch.int64, device="meta")
    noise = torch.zeros(batch, numbers.model.tokens, dtype=torch.float64, device="meta")
    ratio = torch.zeros(batch, dtype=torch.float64, device="meta")
    masked, keep = masks(noise, ratio, numbers.masking.drop)
    return planner.activation_bytes(lambda: model(tokens, masked, keep), model)


def test_activations_of_a_product():
    """The input (3, 5) is kept for the weight's gradient; the weight itself is not counted, nor is its transpose."""
    layer = torch.nn.Linear(5, 7, bias=False, device="meta")
    x = torch.ones(3, 5, device="meta", requires_grad=True)
    assert planner.activation_bytes(lambda: layer(x), layer) == 3 * 5 * 4
    layer, x = torch.nn.Linear(5, 7, bias=False), torch.ones(3, 5, requires_grad=True)
    assert planner.activation_bytes(lambda: layer(x), layer) == 3 * 5 * 4


def test_activations_grow_with_depth_and_batch():
    def depth(n):
        return kept(recipes.load_recipe("pretrain_vit_base", [f"model.encoder={{depth: {n}, width: 768, heads: 12}}"]))

    two, four, six = depth(2), depth(4), depth(6)
    assert six - four == four - two > 0
    # 129 tokens of a block of 768: at least its input, norms, qkv, attention output, MLP in and out, in float32.
    assert (four - two) / 2 > 129 * 768 * 4 * (1 + 1 + 3 + 1 + 1 + 4 + 4)
    assert (four - two) / 2 < 3 * 129 * 768 * 4 * 20


def test_activations_grow_with_the_batch_and_hold_no_weights():
    numbers = recipes.load_recipe("pretrain_vit_base")
    one, two, three = (kept(numbers, batch) for batch in (1, 2, 3))
    assert one == pytest.approx(three - two, rel=0.1)
    constant = two - 2 * (three - two)  # the code vectors
    assert 0 <= constant < 0.02 * 4 * sum(p.numel() for p in outline(numbers).parameters())


def test_largest_micro_batch(monkeypatch):
    memory = type("memory", (), {"total": 16 * 2**30})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    cpu = torch.device("cpu")
    assert planner.largest_micro_batch(2**30, cpu, 1) == 8  # half of the memory
    assert planner.largest_micro_batch(2**30, cpu, 2) == 4
    assert planner.largest_micro_batch(2**40, cpu, 1) == 1  # one has to be tried
    assert planner.largest_micro_batch(1, cpu, 1) == 32  # more would gain nothing


# --- memory, against real tensors

SMALL = ["batch=4", "model.encoder={depth: 3, width: 64, heads: 4}", "model.decoder={depth: 2, width: 64, heads: 4}"]


def really_kept(numbers, which: str, images: int, dtype: torch.dtype) -> int:
    """Bytes alive at the end of a real forward pass, without the weights."""
    model = made.model_of(numbers).to(dtype)
    for block in wrap.recomputed(wrap.blocks(model), which):
        wrap.recompute(block)
    with memory.Live(model.parameters()) as live:
        own = live.now
        loss = made.loss_on_made_inputs(numbers, model, images, dtype)
        kept = live.now - own
    assert loss.isfinite()
    return kept


@pytest.mark.parametrize("name, dtype", [("digits_mage", torch.float32), ("digits_tokenizer", torch.bfloat16)])
def test_activations_of_a_real_step(name, dtype):
    numbers = recipes.load_recipe(name, SMALL if name == "digits_mage" else [])
    planned = planner.activations(numbers, dtype, gpu=False)
    for which in planner.CHECKPOINTING:
        for images in (2, 5):
            assert planned[which].kept(images) == pytest.approx(really_kept(numbers, which, images, dtype), rel=0.05)


def test_live_follows_storages():
    with memory.Live([kept := torch.ones(10)]) as live:
        assert live.now == 40
        view, more = kept.view(2, 5), torch.zeros(100)
        assert live.now == 440
        del more
        assert (live.now, live.peak) == (40, 440) and view.shape == (2, 5)
        x = torch.ones(50, requires_grad=True)
        y = x.exp().sin()  # each keeps something without a Python object
        assert live.now == 40 + 3 * 200
        del x, y
        assert live.now == 40


def test_a_gpu_keeps_no_attention_weights():
    """A CPU keeps softmax, dropout's noise and their product, float32 (B, H, L, L) each, and copies of q, k, v."""
    numbers = recipes.load_recipe("digits_mage", SMALL)
    cpu, gpu = (planner._kept(numbers, 2, torch.float32, where)["none"] / 2 for where in (False, True))
    length = (1 + numbers.model.tokens, 1 + numbers.model.tokens - int(numbers.masking.drop * numbers.model.tokens))
    squares = 4 * (2 * length[0] ** 2 + 3 * length[1] ** 2)
    assert cpu - gpu > 3 * 4 * squares
    assert torch.nn.functional.scaled_dot_product_attention is not planner._fused_attention


def test_parameters_of_vit_base():
    assert sum(planner.parameters(recipes.load_recipe("pretrain_vit_base"))) == 144_128_514


def test_flops_of_a_recipe():
    numbers = recipes.load_recipe("pretrain_vit_base", ["model.vocabulary=2025"])
    assert planner.flops_per_image(numbers) == pytest.approx(162.7e9 + 128.8e9, rel=0.01)
    tokenizer = recipes.load_recipe("digits_tokenizer")
    with torch.device("meta"):
        model, picture = made.model_of(tokenizer), torch.zeros(1, 3, 32, 32)
    assert planner.flops_per_image(tokenizer) == 3 * planner.forward_flops(lambda: model(picture))


# --- a decoder on a frozen encoder


def test_flops_of_a_decoder_on_a_frozen_encoder():
    numbers = recipes.load_recipe("class_conditional_vit_base")
    encoder, decoder = numbers.model.encoder, numbers.model.decoder
    below = encoder.depth * block_flops(129, encoder.width)
    trained = decoder.depth * block_flops(258, decoder.width)  # the class token, 256 places and the label
    trained += 2 * 129 * encoder.width * decoder.width
    trained += 2 * 256 * decoder.width * encoder.width + 2 * 256 * encoder.width * 1024
    assert planner.flops_per_image(numbers, cached=True) == pytest.approx(below + 3 * trained, rel=1e-3)
    live = planner.flops_per_image(numbers) - planner.flops_per_image(numbers, cached=True)
    assert live == pytest.approx(128.8e9, rel=0.01)


CONDITIONAL = [*SMALL, "model.classes=3", "label_dropout=0.1"]


def test_a_decoder_is_what_is_trained_and_its_encoder_counts_as_frozen():
    numbers = recipes.load_recipe("digits_mage", CONDITIONAL)
    with torch.device("meta"):
        whole, encoder = Mage(**numbers.model.model_dump()), made.encoder_of(numbers)
    below = sum(p.numel() for p in encoder.parameters())
    assert sum(planner.parameters(numbers)) == sum(p.numel() for p in whole.parameters()) - below
    frozen = planner.frozen_bytes(numbers, torch.float32)
    assert list(frozen) == ["encoder", "tokenizer"] and frozen["encoder"][0] == 4 * below
    assert list(planner.frozen_bytes(recipes.load_recipe("digits_mage"), torch.float32)) == ["tokenizer"]
    encoder = made.encoder_of(numbers).eval()
    inputs = made.masked_tokens(numbers, 8, "cpu")
    with memory.Live(encoder.parameters()) as live, torch.no_grad():
        weights = live.now
        encoder(*inputs)
    assert frozen["encoder"][1](8) == pytest.approx(live.peak - weights, rel=0.05)


def test_activations_of_a_decoder():
    numbers = recipes.load_recipe("digits_mage", CONDITIONAL)
    planned = planner.activations(numbers, torch.float32, gpu=False)
    for which in planner.CHECKPOINTING:
        assert planned[which].kept(5) == pytest.approx(really_kept(numbers, which, 5, torch.float32), rel=0.05)
    assert planned["none"].kept(5) < planner.activations(
        recipes.load_recipe("digits_mage", SMALL), torch.float32, gpu=False
    )["none"].kept(5)
