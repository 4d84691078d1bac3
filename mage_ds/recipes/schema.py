"""What a recipe may say: every field, its range and its meaning. No number of the paper stands here.

A leaf field is `identity` (it decides what is trained: a run is not continued with another value) or
`machine` (how fast, how often, where: it may change whenever a run is continued).
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
Pair = Annotated[list[Positive], Field(min_length=2, max_length=2)]


def _identity(meaning: str, **ranges) -> Any:
    return Field(description=meaning, **ranges)


def _machine(meaning: str, **ranges) -> Any:
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

    epochs: Annotated[int, Field(ge=1)] | None = _identity("passes over the training split", default=None)
    steps: Annotated[int, Field(ge=1)] | None = _identity("optimizer steps", default=None)
    samples: Annotated[int, Field(ge=1)] | None = _identity("samples seen", default=None)

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

    epochs: Annotated[int, Field(ge=0)] | None = _identity("passes over the training split", default=None)
    steps: Annotated[int, Field(ge=0)] | None = _identity("optimizer steps", default=None)
    samples: Annotated[int, Field(ge=0)] | None = _identity("samples seen", default=None)


class Optimizer(Section):
    base_lr: float = _identity("learning rate at batch 256; in force: base_lr * batch / 256", gt=0)
    min_lr: float = _identity("learning rate at the end of the cosine, not scaled by the batch", ge=0)
    weight_decay: float = _identity("AdamW's decoupled weight decay", ge=0)
    betas: Betas = _identity("AdamW's averaging factors of the gradient and of its square")
    eps: float = _identity("AdamW's term added to the denominator", gt=0)
    clip: Positive | None = _identity("largest norm of the whole gradient; null: not clipped")


class Augmentation(Section):
    scale: Pair | None = _identity("range of the crop's share of the picture; null: no crop")
    ratio: Pair | None = _identity("range of the crop's width / height; null where nothing is cropped")
    flip: bool = _identity("mirror left and right with probability 1/2")

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


class Inputs(Section):
    image_size: int = _identity("height and width of the tokenizer's pictures, in pixels", ge=8)
    augmentation: Augmentation = _identity("strong, weak, none (augmentations.yaml) or {scale, ratio, flip}")
    interpolation: Literal["linear", "cubic"] = _identity("filter for resizing, with antialiasing")
    evaluation_resize: int = _identity("short side of held-out pictures before the centre crop, pixels", ge=8)
    broken_limit: Fraction = _machine("largest share of unreadable pictures; more of them stop the run")

    @model_validator(mode="after")
    def _crop_fits(self):
        if self.evaluation_resize < self.image_size:
            short = self.evaluation_resize
            raise ValueError(f"evaluation_resize = {short}: must be at least image_size = {self.image_size}")
        return self


class Spike(Section):
    """A rule for losses that leap. A run of an earlier version has none in its recipe."""

    action: Literal["none", "stop", "rewind"] = _machine(
        "on a spike: stop the run, or go back to the last checkpoint and skip the samples seen since; none: go on"
    )
    factor: float = _machine("a spike is a loss above this multiple of the median of the last `window` steps", gt=1)
    window: int = _machine("steps that the median is taken over; no rule before that many", ge=2)


class Report(Section):
    log_every: int = _machine("steps between progress lines", ge=1)
    evaluate_every: Duration = _machine("how often the held-out loss is measured")
    evaluate_samples: int = _machine("held-out pictures that are measured", ge=1)
    pictures_every: Duration = _machine("how often pictures are drawn")
    checkpoint_every: Duration = _machine("how often the run is saved")
    keep: int = _machine("newest checkpoints that are kept", ge=1)
    keep_every: int = _machine("every so many checkpoints one is kept for good; 0: none", ge=0, default=0)
    max_skipped: int = _machine("steps in a row without a finite gradient; one more stops the run", ge=0)
    inception: str | None = _machine(
        "file of Inception's weights (torch-fidelity's): adds rFID to a tokenizer's held-out figures; null: none",
        default=None,
    )
    spike: Spike = _machine("what is done where the loss leaps", default=Spike(action="none", factor=2.0, window=100))


class Machine(Section):
    precision: Literal["auto", "bf16", "float32"] = _machine(
        "number format of forward and backward; auto: bf16 where the hardware computes it, else float32"
    )
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = _machine(
        "samples of one forward pass on one rank; auto: the largest that fits and divides"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = _machine(
        "blocks that are computed again in the backward pass, which saves their memory: none, every second one, or all "
        "(about a third more work)"
    )
    compile: bool = _machine("compile each block with torch.compile")
    hang_timeout: int = _machine(
        "seconds without progress after which a rank writes its stack to RUN/logs and ends the run", ge=10, default=1800
    )


class VqganModel(Section):
    channels: int = _identity("channels of the finest level", ge=8, multiple_of=8)
    multipliers: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = _identity(
        "channels of each level / `channels`, finest first; each level but the last halves the picture"
    )
    blocks: int = _identity("residual blocks of each level", ge=1)
    code_dim: int = _identity("numbers in a code", ge=1)
    codes: int = _identity("codes in the codebook", ge=2, le=2**16)  # the most that a token cache holds

    def tokens(self, image_size: int) -> int | None:
        """Tokens of a picture, or None where the picture cannot be halved that often."""
        side, rest = divmod(image_size, 2 ** (len(self.multipliers) - 1))
        return None if rest or not side else side**2


class VqganLoss(Section):
    l1: float = _identity("weight of the mean absolute error of the pixels", ge=0)
    codebook: float = _identity("weight of the loss that pulls codes to encoder outputs", ge=0)
    commitment: float = _identity("weight of the loss that pulls encoder outputs to codes", ge=0)
    perceptual: float = _identity(
        "weight of LPIPS (VGG-16); 0: not computed, and no VGG file is needed", ge=0, default=0.0
    )
    perceptual_weights: str | None = _machine(
        "file of VGG-16's weights for LPIPS (vgg16-397923af.pth); null: the one in torchvision's cache", default=None
    )


class Adversary(Section):
    start: Warmup = _identity("when the discriminator begins to train, and its loss enters the tokenizer's")
    weight: float = _identity("factor of the adaptive weight of the adversarial loss", gt=0)
    most: float = _identity("largest adaptive weight: the ratio of two gradients can explode", gt=0)
    layers: int = _identity("strided convolutions of the PatchGAN", ge=1)
    channels: int = _identity("channels of its first convolution", ge=8)
    norm: Literal["batch", "spectral"] = _identity(
        "batch norm after its inner convolutions, or spectral norm of all their weights"
    )


class Stack(Section):
    depth: int = _identity("transformer blocks", ge=1)
    width: int = _identity("width of the token vectors", ge=1)
    heads: int = _identity("attention heads; must divide the width", ge=1)

    @model_validator(mode="after")
    def _divides(self):
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}: must divide width = {self.width}")
        return self


class MageModel(Section):
    encoder: Stack = _identity("the encoder's size")
    decoder: Stack = _identity("the decoder's size")
    tokens: int = _identity("tokens of a picture", ge=1)
    codes: int = _identity("codes of the tokenizer: the classes that the head predicts", ge=2)
    vocabulary: int = _identity(
        "rows of the word embedding: codes + 2 (fake class, mask); the authors' files: 2025", ge=4
    )
    dropout: float = _identity("dropout after the embedding and in every block", ge=0, lt=1)
    padding: Literal["cls", "mask"] = _identity(
        "what fills masked places before the decoder: the encoder's class output, or a learned [MASK]"
    )
    classes: int | None = _identity(
        "labels that the decoder takes, trained on a frozen encoder (--init); null: it takes none", ge=1, default=None
    )

    @model_validator(mode="after")
    def _words(self):
        if self.vocabulary < self.codes + 2:
            raise ValueError(f"vocabulary = {self.vocabulary}: must be at least codes + 2 = {self.codes + 2}")
        return self


class Masking(Section):
    mean: Fraction = _identity("mean of the normal that the mask ratio is drawn from, before truncation")
    std: float = _identity("its standard deviation, before truncation", gt=0)
    low: float = _identity("smallest mask ratio", gt=0, le=1)
    high: float = _identity("largest mask ratio", gt=0, le=1)
    drop: float = _identity("share of all tokens that is masked and left out of the encoder", ge=0, lt=1)
    per: Literal["sample", "batch"] = _identity("one mask ratio for each sample, or for each micro-batch")

    @model_validator(mode="after")
    def _order(self):
        if self.low >= self.high:
            raise ValueError(f"low = {self.low}: must be below high = {self.high}")
        if self.drop > self.low:
            raise ValueError(f"drop = {self.drop}: must not exceed low = {self.low} (only masked ones drop out)")
        return self


class Sampling(Section):
    steps: int = _identity("decoding iterations T of a generated picture", ge=1)
    temperature: float = _identity("weight tau of the Gumbel noise in the choice of tokens that stay", ge=0)
    token_temperature: float = _identity("temperature of the distribution that tokens are drawn from", ge=0, default=1)
    order: Literal["confidence", "halton"] = _identity(
        "which tokens stay first: those of highest confidence, or those that the Halton sequence visits first",
        default="confidence",
    )
    drop: float = _identity(
        "share of all tokens that is left out of the encoder while at least as many are masked; 0: none",
        ge=0,
        lt=1,
        default=0,
    )
    guidance: float = _identity(
        "how far logits are moved away from those without a label; 0: not at all", ge=0, default=0
    )
    guidance_schedule: Literal["constant", "linear", "power-cosine"] = _identity(
        "the guidance over the steps: always the whole, rising in a line, or late", default="constant"
    )


class _Recipe(Section):
    task: Literal["tokenizer", "pretrain"] = _identity("what is trained")  # first in the order of the fields
    description: str = _machine("what this recipe trains, in one line")
    seed: int = _identity("start of every random number of the run", ge=0, lt=2**63)
    batch: int = _identity("samples of one optimizer step, over all ranks and micro-batches", ge=1)
    duration: Duration = _identity("length of the training")
    warmup: Warmup = _identity("linear warm-up of the learning rate from 0")
    optimizer: Optimizer = _identity("AdamW; the learning rate falls as a cosine")
    inputs: Inputs = _identity("from picture files to batches")
    report: Report = _identity("logging and saving")
    machine: Machine = _identity("how this machine runs it")

    @model_validator(mode="after")
    def _falls(self):
        peak, low = self.effective_lr(), self.optimizer.min_lr
        if low > peak * (1 + 1e-9):
            raise ValueError(
                f"optimizer.min_lr = {low:g}: is above the learning rate in force, base_lr * batch / 256 = {peak:g}; "
                f"choose {peak:g} (a constant rate) or less"
            )
        return self

    def leaves(self) -> Iterator[Leaf]:
        """Every leaf field in order; a Duration is one leaf, with a value such as {"epochs": 1600}."""
        yield from _leaves(self, "")

    def identity(self) -> dict[str, Any]:
        """Dotted key -> plain value of what a continued run must share (the duration among them)."""
        return {leaf.key: leaf.value for leaf in self.leaves() if leaf.kind == "identity"}

    def effective_lr(self) -> float:
        """The learning rate at the top of the schedule."""
        return self.optimizer.base_lr * self.batch / 256


def _leaves(section: Section, prefix: str) -> Iterator[Leaf]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section) and not isinstance(value, Duration):
            yield from _leaves(value, f"{prefix}{name}.")
            continue
        plain = value.model_dump() if isinstance(value, Duration) else value
        kind = (field.json_schema_extra or {}).get("kind", "identity")
        yield Leaf(prefix + name, plain, kind, field.description)


class TokenizerRecipe(_Recipe):
    task: Literal["tokenizer"] = _identity("trains a tokenizer (VQGAN)")
    model: VqganModel = _identity("the tokenizer's size")
    loss: VqganLoss = _identity("the weights of the loss")
    codebook_init: Literal["data", "uniform"] = _identity(
        "first codes: encoder outputs of the first batches, or uniform within +-1/codes"
    )
    adversary: Adversary | None = _identity("the PatchGAN that sharpens the tokenizer; null: none", default=None)
    reseed_after: int = _identity(
        "steps without use after which a code is set to an encoder output of the batch; 0: never", ge=0, default=0
    )

    @model_validator(mode="after")
    def _agree(self):
        if self.model.tokens(self.inputs.image_size) is None:
            levels = len(self.model.multipliers)
            raise ValueError(
                f"inputs.image_size = {self.inputs.image_size}: must be a multiple of {2 ** (levels - 1)} "
                f"(model.multipliers has {levels} levels)"
            )
        if self.adversary and self.inputs.image_size >> self.adversary.layers < 3:
            raise ValueError(
                f"adversary.layers = {self.adversary.layers}: leaves nothing of inputs.image_size = "
                f"{self.inputs.image_size}, it needs {3 << self.adversary.layers} pixels"
            )
        if self.loss.perceptual and self.inputs.image_size < 16:
            raise ValueError(f"loss.perceptual: inputs.image_size = {self.inputs.image_size} must be at least 16")
        return self


class PretrainRecipe(_Recipe):
    task: Literal["pretrain"] = _identity("trains a MAGE on the tokens of a tokenizer")
    tokenizer: VqganModel = _identity("the tokenizer that is expected, and made by --tokenizer random")
    model: MageModel = _identity("the MAGE's size")
    masking: Masking = _identity("which tokens are masked")
    label_smoothing: float = _identity("share of the target that is spread over all codes", ge=0, lt=1)
    label_dropout: float = _identity(
        "share of the samples whose label is withheld, so that pictures can be guided", ge=0, lt=1, default=0
    )
    sampling: Sampling = _identity("generated pictures, where the command line does not say otherwise")
    published: dict[Literal["fid", "is"], float] | None = _machine(
        "figures of 50,000 pictures that the paper gives, shown beside measured ones; null: none", default=None
    )

    @model_validator(mode="after")
    def _agree(self):
        size, levels = self.inputs.image_size, len(self.tokenizer.multipliers)
        tokens = self.tokenizer.tokens(size)
        if tokens != self.model.tokens:
            raise ValueError(
                f"model.tokens = {self.model.tokens}: a tokenizer of {levels} levels (tokenizer.multipliers) "
                f"makes {tokens or 'no whole number of'} tokens of inputs.image_size = {size}"
            )
        codes = self.tokenizer.codes
        if codes != self.model.codes:
            raise ValueError(f"model.codes = {self.model.codes}: must equal tokenizer.codes = {codes}")
        if self.label_dropout and self.model.classes is None:
            raise ValueError(f"label_dropout = {self.label_dropout}: this model takes no labels (model.classes)")
        if self.sampling.guidance and not self.label_dropout:
            raise ValueError(
                f"sampling.guidance = {self.sampling.guidance}: needs a model that also learns without labels; set "
                "model.classes and label_dropout"
            )
        return self


Recipe = TokenizerRecipe | PretrainRecipe
TASKS: dict[str, type[TokenizerRecipe] | type[PretrainRecipe]] = {
    "tokenizer": TokenizerRecipe,
    "pretrain": PretrainRecipe,
}
