"""What a recipe may say, by the task that it trains: sections.py holds the sections."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import model_validator

from mage_ds.recipes.sections import (
    Adversary,
    ClassifierModel,
    Contrastive,
    Duration,
    Inputs,
    Leaf,
    Machine,
    MageModel,
    Masking,
    Mix,
    Optimizer,
    Report,
    Sampling,
    Section,
    VqganLoss,
    VqganModel,
    Warmup,
    identity,
    machine,
)


class _Recipe(Section):
    task: Literal["tokenizer", "pretrain", "classify"] = identity("what is trained")  # first in the order of the fields
    description: str = machine("what this recipe trains, in one line")
    seed: int = identity("start of every random number of the run", ge=0, lt=2**63)
    batch: int = identity("samples of one optimizer step, over all ranks and micro-batches", ge=1)
    duration: Duration = identity("length of the training")
    warmup: Warmup = identity("linear warm-up of the learning rate from 0")
    optimizer: Optimizer = identity("the learning rate falls as a cosine")
    inputs: Inputs = identity("from picture files to batches")
    report: Report = identity("logging and saving")
    machine: Machine = identity("how this machine runs it")

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

    @property
    def views(self) -> int:
        """How often a picture is seen in a step, cropped and mirrored otherwise each time."""
        return 2 if getattr(self, "contrastive", None) else 1


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
    task: Literal["tokenizer"] = identity("trains a tokenizer (VQGAN)")
    model: VqganModel = identity("the tokenizer's size")
    loss: VqganLoss = identity("the weights of the loss")
    codebook_init: Literal["data", "uniform"] = identity(
        "first codes: encoder outputs of the first batches, or uniform within +-1/codes"
    )
    adversary: Adversary | None = identity("the PatchGAN that sharpens the tokenizer; null: none", default=None)
    reseed_after: int = identity(
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
    task: Literal["pretrain"] = identity("trains a MAGE on the tokens of a tokenizer")
    tokenizer: VqganModel = identity("the tokenizer that is expected, and made by --tokenizer random")
    model: MageModel = identity("the MAGE's size")
    masking: Masking | None = identity("which tokens are masked; null: none, where nothing is reconstructed")
    objective: Literal["reconstruction", "contrastive", "both"] = identity(
        "predict masked tokens (MAGE), tell two views of a picture from others, or both (MAGE-C)",
        default="reconstruction",
    )
    contrastive: Contrastive | None = identity("the loss between two views; null: none", default=None)
    label_smoothing: float = identity("share of the target that is spread over all codes", ge=0, lt=1)
    label_dropout: float = identity(
        "share of the samples whose label is withheld, so that pictures can be guided", ge=0, lt=1, default=0
    )
    sampling: Sampling = identity("generated pictures, where the command line does not say otherwise")
    published: dict[Literal["fid", "is", "top1"], float] | None = machine(
        "what the paper gives, shown beside measured figures: of 50,000 pictures, and of a linear probe in per cent; "
        "null: nothing",
        default=None,
    )

    @model_validator(mode="after")
    def _agree(self):
        _check_tokens(self)
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
        self._check_objective()
        return self

    def _check_objective(self):
        contrast = self.contrastive
        if (contrast is None) != (self.objective == "reconstruction"):
            verb = "needs" if contrast is None else "has no use for"
            raise ValueError(f"objective = {self.objective}: {verb} the section contrastive")
        if self.masking is None and self.objective != "contrastive":
            raise ValueError(f"masking is null: objective = {self.objective} needs masks")
        if contrast and self.batch % contrast.images:
            raise ValueError(f"contrastive.images = {contrast.images}: must divide batch = {self.batch}")
        low = self.masking.low if self.masking else 0.0
        if contrast and contrast.highest <= low:
            raise ValueError(
                f"contrastive.highest = {contrast.highest}: no picture would count, as mask ratios begin at {low}"
            )
        cuts, changed = self.inputs.augmentation, self.inputs.colour or self.inputs.policy
        if contrast and not (self.masking or cuts.scale or cuts.flip or changed):
            raise ValueError(
                f"objective = {self.objective}: both views of a picture are the same, without masks and augmentation"
            )
        if contrast and self.model.classes is not None:
            raise ValueError(f"objective = {self.objective}: not with model.classes, whose encoder is frozen")


class ClassifyRecipe(_Recipe):
    task: Literal["classify"] = identity("trains a classifier, mostly on a pre-trained encoder")
    protocol: Literal["probe", "finetune", "scratch"] = identity(
        "a linear layer on a frozen encoder, the whole encoder on from pre-trained weights, or all from initial values"
    )
    tokenizer: VqganModel | None = identity("the tokenizer that is expected; null where model.patch is given")
    model: ClassifierModel = identity("the classifier's size")
    label_smoothing: float = identity("share of the target that is spread over all labels", ge=0, lt=1)
    mix: Mix | None = identity("pairs of pictures that are joined; null: none", default=None)
    published: dict[Literal["top1"], float] | None = machine(
        "accuracy in per cent that the paper gives, shown beside the measured one; null: none", default=None
    )

    @model_validator(mode="after")
    def _agree(self):
        if (self.tokenizer is None) != (self.model.patch is not None):
            raise ValueError("tokenizer: give either model.patch or a tokenizer")
        if self.model.patch and self.inputs.image_size % self.model.patch:
            raise ValueError(
                f"model.patch = {self.model.patch}: must divide inputs.image_size = {self.inputs.image_size}"
            )
        if self.tokenizer:
            _check_tokens(self)
        if self.protocol == "probe" and (self.mix or self.model.drop_path or self.optimizer.layer_decay):
            raise ValueError("protocol = probe: mix, model.drop_path and optimizer.layer_decay have no use there")
        return self


def _check_tokens(recipe: PretrainRecipe | ClassifyRecipe) -> None:
    size, levels = recipe.inputs.image_size, len(recipe.tokenizer.multipliers)
    tokens = recipe.tokenizer.tokens(size)
    if tokens != recipe.model.tokens:
        raise ValueError(
            f"model.tokens = {recipe.model.tokens}: a tokenizer of {levels} levels (tokenizer.multipliers) "
            f"makes {tokens or 'no whole number of'} tokens of inputs.image_size = {size}"
        )


Recipe = TokenizerRecipe | PretrainRecipe | ClassifyRecipe
TASKS: dict[str, type[Recipe]] = {
    "tokenizer": TokenizerRecipe,
    "pretrain": PretrainRecipe,
    "classify": ClassifyRecipe,
}
