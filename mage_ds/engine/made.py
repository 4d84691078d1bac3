"""The modules that a recipe trains or stands on, without initial values, and a step of them on made inputs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mage_ds.interop import parts
from mage_ds.models import ContrastiveEncoder, Decoder, Encoder, Mage, MageC, PixelViT, ProbeHead, Vqgan
from mage_ds.models.adversary import Lpips, PatchGAN
from mage_ds.models.contrastive import info_nce
from mage_ds.models.mage import token_loss
from mage_ds.models.masking import masks
from mage_ds.recipes.schema import ClassifyRecipe, PretrainRecipe, Recipe, TokenizerRecipe
from mage_ds.recipes.sections import VqganModel

_DECODER = ("decoder", "tokens", "vocabulary", "dropout", "padding", "classes")  # of a MAGE's numbers


def model_of(recipe: Recipe) -> torch.nn.Module:
    """The model that the recipe trains, without initial values, on torch's default device: of a MAGE with classes the
    decoder alone, of a linear probe the head."""
    numbers = recipe.model.model_dump()
    if isinstance(recipe, TokenizerRecipe):
        return Vqgan(**numbers)
    if isinstance(recipe, ClassifyRecipe):
        if recipe.protocol == "probe":
            return ProbeHead(width=recipe.model.encoder.width, classes=numbers["classes"], head_std=numbers["head_std"])
        kind, numbers = parts.numbers(recipe)
        return parts.MODELS[kind](**numbers)
    if recipe.contrastive:
        projection = recipe.contrastive.model_dump(include={"hidden", "hidden_layers", "out"})
        if recipe.objective == "both":
            return MageC(projection=projection, **numbers)
        return ContrastiveEncoder(projection=projection, **{key: numbers[key] for key in parts.ENCODER})
    if recipe.model.classes is None:
        return Mage(**numbers)
    return Decoder(width=recipe.model.encoder.width, **{key: numbers[key] for key in _DECODER})


def encoder_of(recipe: Recipe) -> Encoder | PixelViT | None:
    """The frozen encoder below the trained model, where there is one; as `model_of`."""
    numbers = recipe.model.model_dump()
    if isinstance(recipe, ClassifyRecipe):
        if recipe.protocol != "probe":
            return None
        if recipe.model.patch:
            return PixelViT(image_size=recipe.inputs.image_size, **{key: numbers[key] for key in ("encoder", "patch")})
        numbers["codes"] = recipe.tokenizer.codes
    elif not isinstance(recipe, PretrainRecipe) or recipe.model.classes is None:
        return None
    return Encoder(**{key: numbers[key] for key in parts.ENCODER})


def encode(recipe: Recipe, encoder, images: int, device) -> torch.Tensor:
    """What a step asks of the frozen encoder, of made inputs in torch's default dtype."""
    if isinstance(recipe, PretrainRecipe):
        return encoder(*masked_tokens(recipe, images, device))
    return encoder.features(_whole(recipe, images, device, torch.get_default_dtype()))


def tokenizer_of(recipe: Recipe) -> VqganModel | None:
    """The frozen tokenizer beside the trained model, where there is one."""
    return None if isinstance(recipe, TokenizerRecipe) else recipe.tokenizer


def judges_of(recipe: Recipe) -> list[tuple[torch.nn.Module, Callable]]:
    """What looks at a tokenizer's reconstructions beside their pixels, on torch's default device: the network, and its
    call on (pictures, reconstructions)."""
    found = []
    if not isinstance(recipe, TokenizerRecipe):
        return found
    if recipe.loss.perceptual:
        lpips = Lpips()
        found.append((lpips, lambda real, fake: lpips(fake, real)))
    if numbers := recipe.adversary:
        critic = PatchGAN(numbers.channels, numbers.layers, numbers.norm)
        found.append((critic, lambda real, fake: (critic(real), critic(fake))))
    return found


def loss_on_made_inputs(recipe: Recipe, model, images: int, dtype: torch.dtype, device="cpu") -> torch.Tensor:
    """The recipe's loss of `images` inputs with random values; `model`: plain, or an engine around it."""
    if isinstance(recipe, ClassifyRecipe):
        return F.cross_entropy(*classified(recipe, model, images, dtype, device))
    if isinstance(recipe, TokenizerRecipe):
        pictures = pictures_of(recipe, images, device, torch.float32)
        drawn, _, codebook, commitment = model(pictures.to(dtype))
        l1 = (drawn.float() - pictures).abs().mean(dim=(1, 2, 3))
        weights = recipe.loss
        return (weights.l1 * l1 + weights.codebook * codebook + weights.commitment * commitment).mean()
    if recipe.contrastive:
        return _contrast(recipe, model, images, device)
    logits, tokens, masked = mage_on_made_inputs(recipe, model, images, dtype, device)
    losses, _ = token_loss(logits, tokens, masked, recipe.label_smoothing)
    return losses.mean()


def _contrast(recipe: PretrainRecipe, model, images: int, device) -> torch.Tensor:
    """Of two views of each picture, all of which count, with what a rank has of the contrast alone."""
    tokens, masked, keep = masked_tokens(recipe, 2 * images, device)
    counted = torch.ones(2 * images, device=device)
    made = model(tokens, masked, keep, counted, _alone)
    logits, views = made if recipe.objective == "both" else (None, made)
    temperature = recipe.contrastive.temperature
    loss, _, _ = info_nce(views, counted[:images], temperature=temperature, gathered=_alone)
    if logits is None:
        return loss
    return loss + token_loss(logits, tokens, masked, recipe.label_smoothing)[0].mean()


def _alone(x: torch.Tensor) -> torch.Tensor:
    return x


def mage_on_made_inputs(recipe: PretrainRecipe, model, images: int, dtype: torch.dtype, device):
    """Logits of the trained model, a decoder's from made vectors of a frozen encoder; the tokens and their masks."""
    tokens, masked, keep = masked_tokens(recipe, images, device)
    if recipe.model.classes is None:
        return model(tokens, masked, keep), tokens, masked
    width, labels = recipe.model.encoder.width, tokens[:, 0] % recipe.model.classes
    x = torch.rand(images, 1 + keep.shape[1], width, device=device, dtype=dtype)
    words = torch.rand(recipe.model.codes, width, device=device, dtype=dtype)
    return model(x, masked, keep, words, labels), tokens, masked


def classified(recipe: ClassifyRecipe, model, images: int, dtype: torch.dtype, device):
    """Class scores of the trained model, a probe's from made features of a frozen encoder; labels for them."""
    labels = torch.randint(recipe.model.classes, (images,), device=device)
    if recipe.protocol == "probe":
        return model(torch.rand(images, recipe.model.encoder.width, device=device, dtype=dtype)).float(), labels
    return model(_whole(recipe, images, device, dtype)).float(), labels


def _whole(recipe: ClassifyRecipe, images: int, device, dtype: torch.dtype) -> torch.Tensor:
    """What a classifier sees of whole pictures: tokens, or pixels."""
    if recipe.tokenizer is None:
        return pictures_of(recipe, images, device, dtype)
    return torch.randint(recipe.tokenizer.codes, (images, recipe.model.tokens), device=device)


def masked_tokens(
    recipe: PretrainRecipe, images: int, device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Random tokens and masks: int64 (images, N), bool (images, N), and what the encoder keeps (None: all)."""
    tokens = torch.randint(recipe.model.codes, (images, recipe.model.tokens), device=device)
    if recipe.masking is None:
        return tokens, torch.zeros_like(tokens, dtype=torch.bool), None
    noise = torch.rand(images, recipe.model.tokens, dtype=torch.float64, device=device)
    ratio = torch.full((images,), recipe.masking.high, dtype=torch.float64, device=device)
    return tokens, *masks(noise, ratio, recipe.masking.drop)


def pictures_of(recipe: Recipe, images: int, device, dtype: torch.dtype) -> torch.Tensor:
    size = recipe.inputs.image_size
    return torch.rand(images, 3, size, size, device=device, dtype=dtype)
