"""The sections of a recipe: every field, its range and its meaning. No number of the paper stands here.

A leaf field is `identity` (it decides what is trained: a run is not continued with another value) or
`machine` (how fast, how often, where: it may change whenever a run is continued).
"""

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Betas = Annotated[list[Share], Field(min_length=2, max_length=2)]
Pair = Annotated[list[Positive], Field(min_length=2, max_length=2)]


def identity(meaning: str, **ranges) -> Any:
    return Field(description=meaning, **ranges)


def machine(meaning: str, **ranges) -> Any:
    return Field(description=meaning, json_schema_extra={"kind": "machine"}, **ranges)


class Leaf(NamedTuple):
    key: str
    value: Any
    kind: Literal["identity", "machine"]
    meaning: str


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Duration(Section):
    """A length of training: exactly one of its fields is set. `load.resolve` turns it into steps."""

    epochs: Annotated[int, Field(ge=1)] | None = identity("passes over the training split", default=None)
    steps: Annotated[int, Field(ge=1)] | None = identity("optimizer steps", default=None)
    samples: Annotated[int, Field(ge=1)] | None = identity("samples seen", default=None)

    @model_validator(mode="after")
    def _one(self):
        if len(self.model_dump()) != 1:
            raise ValueError("must give exactly one of epochs, steps, samples")
        return self

    @model_serializer
    def _given(self) -> dict[str, int]:
        given = {"epochs": self.epochs, "steps": self.steps, "samples": self.samples}
        return {unit: amount for unit, amount in given.items() if amount is not None}


class Warmup(Duration):
    """As Duration; it may be 0."""

    epochs: Annotated[int, Field(ge=0)] | None = identity("passes over the training split", default=None)
    steps: Annotated[int, Field(ge=0)] | None = identity("optimizer steps", default=None)
    samples: Annotated[int, Field(ge=0)] | None = identity("samples seen", default=None)


class Optimizer(Section):
    name: Literal["adamw", "lars"] = identity(
        "AdamW, or LARS, which needs float32 and ZeRO stage 0: shards hide the norms that it compares", default="adamw"
    )
    base_lr: float = identity("learning rate at batch 256; in force: base_lr * batch / 256", gt=0)
    min_lr: float = identity("learning rate at the end of the cosine, not scaled by the batch", ge=0)
    weight_decay: float = identity("weight decay: AdamW's is decoupled from the gradient", ge=0)
    betas: Betas | None = identity("AdamW's averaging factors of the gradient and of its square", default=None)
    eps: Positive | None = identity("AdamW's term added to the denominator", default=None)
    momentum: Share | None = identity("LARS's factor of the update before", default=None)
    trust: Positive | None = identity("LARS's largest step as a share of a tensor's own norm", default=None)
    clip: Positive | None = identity("largest norm of the whole gradient; null: not clipped")
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = identity(
        "factor of the learning rate from each block of the encoder to the one before it; null: one rate for all",
        default=None,
    )
    ema: Share | None = identity(
        "averaging factor a step of a second, float32 set of weights that follows the trained one; null: none",
        default=None,
    )

    @model_validator(mode="after")
    def _whose(self):
        theirs = {"adamw": ("betas", "eps"), "lars": ("momentum", "trust")}
        for name, fields in theirs.items():
            for field in fields:
                if (getattr(self, field) is None) == (name == self.name):
                    need = "is missing" if name == self.name else f"belongs to {name}, this is {self.name}"
                    raise ValueError(f"{field} {need}")
        return self


class Augmentation(Section):
    scale: Pair | None = identity("range of the crop's share of the picture; null: no crop")
    ratio: Pair | None = identity("range of the crop's width / height; null where nothing is cropped")
    flip: bool = identity("mirror left and right with probability 1/2")

    @model_validator(mode="after")
    def _ranges(self):
        for name, pair in (("scale", self.scale), ("ratio", self.ratio)):
            if pair and pair[0] > pair[1]:
                raise ValueError(f"{name} = {pair}: the first value must not exceed the second")
        if self.scale and self.scale[1] > 1:
            raise ValueError(f"scale = {self.scale}: a crop is at most 1, the whole picture")
        if (self.scale is None) != (self.ratio is None):
            raise ValueError("scale and ratio must both be given or both be null")
        return self


class Colour(Section):
    """SimCLR's changes of colour, after the crop: jitter, then grey, then blur."""

    brightness: Share = identity("a factor within 1 +- this")
    contrast: Share = identity("a factor within 1 +- this")
    saturation: Share = identity("a factor within 1 +- this")
    hue: Annotated[float, Field(ge=0, le=0.5)] = identity("a turn within +- this of the circle")
    jitter: Fraction = identity("probability that these four are changed")
    grey: Fraction = identity("probability that the picture is made grey")
    blur: Fraction = identity("probability that it is blurred")
    sigma: Pair = identity("range of the blur's standard deviation, in pixels")


_NUMBER = r"\d+(\.\d+)?"  # timm takes whatever else for a part that it does not know, or for nothing
_POLICY = re.compile(rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]))*")


class Inputs(Section):
    image_size: int = identity("height and width of the model's pictures, in pixels", ge=8)
    augmentation: Augmentation = identity("strong, weak, none (augmentations.yaml) or {scale, ratio, flip}")
    crop: Literal["tried", "clamped"] = identity(
        "of ten random boxes the first that fits, or one box, cut to the picture", default="tried"
    )
    colour: Colour | None = identity("random changes of colour; null: none", default=None)
    policy: str | None = identity(
        "timm's random augmentation of the cropped picture, as `rand-m9-mstd0.5-inc1`; null: none", default=None
    )
    interpolation: Literal["linear", "cubic"] = identity("filter for resizing, with antialiasing")
    evaluation_resize: int = identity("short side of held-out pictures before the centre crop, pixels", ge=8)
    broken_limit: Fraction = machine("largest share of unreadable pictures; more of them stop the run")

    @model_validator(mode="after")
    def _crop_fits(self):
        if self.evaluation_resize < self.image_size:
            short = self.evaluation_resize
            raise ValueError(f"evaluation_resize = {short}: must be at least image_size = {self.image_size}")
        return self

    @model_validator(mode="after")
    def _policy_is_known(self):
        if self.policy is not None and not _POLICY.fullmatch(self.policy):
            parts = "mN (magnitude), nN (operations), pX (probability of each), mstdX, mmaxN, inc0 or inc1"
            raise ValueError(f"policy = {self.policy}: must be `rand`, and after each `-` one of {parts}")
        return self


class Spike(Section):
    """A rule for losses that leap. A run of an earlier version has none in its recipe."""

    action: Literal["none", "stop", "rewind"] = machine(
        "on a spike: stop the run, or go back to the last checkpoint and skip the samples seen since; none: go on"
    )
    factor: float = machine("a spike is a loss above this multiple of the median of the last `window` steps", gt=1)
    window: int = machine("steps that the median is taken over; no rule before that many", ge=2)


class Report(Section):
    log_every: int = machine("steps between progress lines", ge=1)
    evaluate_every: Duration = machine("how often the held-out loss is measured")
    evaluate_samples: int = machine("held-out pictures that are measured", ge=1)
    pictures_every: Duration = machine("how often pictures are drawn")
    checkpoint_every: Duration = machine("how often the run is saved")
    keep: int = machine("newest checkpoints that are kept", ge=1)
    keep_every: int = machine("every so many checkpoints one is kept for good; 0: none", ge=0, default=0)
    max_skipped: int = machine("steps in a row without a finite gradient; one more stops the run", ge=0)
    inception: str | None = machine(
        "file of Inception's weights (torch-fidelity's): adds rFID to a tokenizer's held-out figures; null: none",
        default=None,
    )
    spike: Spike = machine("what is done where the loss leaps", default=Spike(action="none", factor=2.0, window=100))


class Machine(Section):
    precision: Literal["auto", "bf16", "float32"] = machine(
        "number format of forward and backward; auto: bf16 where the hardware computes it, else float32"
    )
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = machine(
        "samples of one forward pass on one rank; auto: the largest that fits and divides"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = machine(
        "blocks that are computed again in the backward pass, which saves their memory: none, every second one, or all "
        "(about a third more work)"
    )
    compile: bool = machine("compile each block with torch.compile")
    hang_timeout: int = machine(
        "seconds without progress after which a rank writes its stack to RUN/logs and ends the run", ge=10, default=1800
    )


class VqganModel(Section):
    channels: int = identity("channels of the finest level", ge=8, multiple_of=8)
    multipliers: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = identity(
        "channels of each level / `channels`, finest first; each level but the last halves the picture"
    )
    blocks: int = identity("residual blocks of each level", ge=1)
    code_dim: int = identity("numbers in a code", ge=1)
    codes: int = identity("codes in the codebook", ge=2, le=2**16)  # the most that a token cache holds

    def tokens(self, image_size: int) -> int | None:
        """Tokens of a picture, or None where the picture cannot be halved that often."""
        side, rest = divmod(image_size, 2 ** (len(self.multipliers) - 1))
        return None if rest or not side else side**2


class VqganLoss(Section):
    l1: float = identity("weight of the mean absolute error of the pixels", ge=0)
    codebook: float = identity("weight of the loss that pulls codes to encoder outputs", ge=0)
    commitment: float = identity("weight of the loss that pulls encoder outputs to codes", ge=0)
    perceptual: float = identity(
        "weight of LPIPS (VGG-16); 0: not computed, and no VGG file is needed", ge=0, default=0.0
    )
    perceptual_weights: str | None = machine(
        "file of VGG-16's weights for LPIPS (vgg16-397923af.pth); null: the one in torchvision's cache", default=None
    )


class Adversary(Section):
    start: Warmup = identity("when the discriminator begins to train, and its loss enters the tokenizer's")
    weight: float = identity("factor of the adaptive weight of the adversarial loss", gt=0)
    most: float = identity("largest adaptive weight: the ratio of two gradients can explode", gt=0)
    layers: int = identity("strided convolutions of the PatchGAN", ge=1)
    channels: int = identity("channels of its first convolution", ge=8)
    norm: Literal["batch", "spectral"] = identity(
        "batch norm after its inner convolutions, or spectral norm of all their weights"
    )


class Stack(Section):
    depth: int = identity("transformer blocks", ge=1)
    width: int = identity("width of the token vectors", ge=1)
    heads: int = identity("attention heads; must divide the width", ge=1)

    @model_validator(mode="after")
    def _divides(self):
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}: must divide width = {self.width}")
        return self


class MageModel(Section):
    encoder: Stack = identity("the encoder's size")
    decoder: Stack = identity("the decoder's size")
    tokens: int = identity("tokens of a picture", ge=1)
    codes: int = identity("codes of the tokenizer: the classes that the head predicts", ge=2)
    vocabulary: int = identity(
        "rows of the word embedding: codes + 2 (fake class, mask); the authors' files: 2025", ge=4
    )
    dropout: float = identity("dropout after the embedding and in every block", ge=0, lt=1)
    padding: Literal["cls", "mask"] = identity(
        "what fills masked places before the decoder: the encoder's class output, or a learned [MASK]"
    )
    classes: int | None = identity(
        "labels that the decoder takes, trained on a frozen encoder (--init); null: it takes none", ge=1, default=None
    )

    @model_validator(mode="after")
    def _words(self):
        if self.vocabulary < self.codes + 2:
            raise ValueError(f"vocabulary = {self.vocabulary}: must be at least codes + 2 = {self.codes + 2}")
        return self


class Masking(Section):
    mean: Fraction = identity("mean of the normal that the mask ratio is drawn from, before truncation")
    std: float = identity("its standard deviation, before truncation", gt=0)
    low: float = identity("smallest mask ratio", gt=0, le=1)
    high: float = identity("largest mask ratio", gt=0, le=1)
    drop: float = identity("share of all tokens that is masked and left out of the encoder", ge=0, lt=1)
    per: Literal["sample", "batch"] = identity("one mask ratio for each sample, or for each micro-batch")

    @model_validator(mode="after")
    def _order(self):
        if self.low >= self.high:
            raise ValueError(f"low = {self.low}: must be below high = {self.high}")
        if self.drop > self.low:
            raise ValueError(f"drop = {self.drop}: must not exceed low = {self.low} (only masked ones drop out)")
        return self


class Sampling(Section):
    steps: int = identity("decoding iterations T of a generated picture", ge=1)
    temperature: float = identity("weight tau of the Gumbel noise in the choice of tokens that stay", ge=0)
    token_temperature: float = identity("temperature of the distribution that tokens are drawn from", ge=0, default=1)
    order: Literal["confidence", "halton"] = identity(
        "which tokens stay first: those of highest confidence, or those that the Halton sequence visits first",
        default="confidence",
    )
    drop: float = identity(
        "share of all tokens that is left out of the encoder while at least as many are masked; 0: none",
        ge=0,
        lt=1,
        default=0,
    )
    guidance: float = identity(
        "how far logits are moved away from those without a label; 0: not at all", ge=0, default=0
    )
    guidance_schedule: Literal["constant", "linear", "power-cosine"] = identity(
        "the guidance over the steps: always the whole, rising in a line, or late", default="constant"
    )


class Contrastive(Section):
    """MAGE-C's loss between two views of a picture (paper section 3, Tables 7 to 9)."""

    weight: float = identity("lambda: weight of the contrastive loss beside the reconstruction's", ge=0)
    temperature: float = identity("temperature of InfoNCE", gt=0)
    images: int = identity("pictures of one contrast, over all ranks: a micro batch x world size is as many", ge=2)
    highest: Fraction = identity("a picture counts where the mask ratios of both its views are below this")
    hidden: int = identity("width of the projection head's hidden layers", ge=1)
    hidden_layers: int = identity("hidden layers of the projection head, each with batch norm over all ranks", ge=1)
    out: int = identity("numbers that two views are compared by", ge=2)


class ClassifierModel(Section):
    encoder: Stack = identity("the encoder's size")
    classes: int = identity("labels that it tells apart", ge=2)
    tokens: int | None = identity("tokens of a picture; null where patch is given", ge=1, default=None)
    vocabulary: int | None = identity(
        "rows of the word embedding, as the pre-trained MAGE's; null where patch is given", ge=4, default=None
    )
    patch: int | None = identity(
        "side in pixels of the patches that a plain ViT takes in place of tokens (MAE, timm); null: tokens",
        ge=1,
        default=None,
    )
    dropout: Share = identity("dropout after the token embedding, the only one")
    drop_path: Share = identity("share of the samples that pass by the last block; less in the ones before it")
    head_std: float = identity("standard deviation of the head's initial weights", gt=0)

    @model_validator(mode="after")
    def _one(self):
        for field in ("tokens", "vocabulary"):
            if (getattr(self, field) is None) == (self.patch is None):
                raise ValueError(f"{field}: give either patch, or tokens and vocabulary")
        return self


class Mix(Section):
    """Pairs of pictures that are joined, as timm's Mixup does it, one draw a micro-batch."""

    mixup: float = identity("alpha of the Beta distribution of mixup; 0: no mixup", ge=0)
    cutmix: float = identity("alpha of the Beta distribution of cutmix; 0: no cutmix", ge=0)
    probability: Fraction = identity("share of the micro-batches that are mixed")
    switch: Fraction = identity("share of the mixed ones that are cut where both are given")
