"""What lies below a model that is trained: its tokenizer, its encoder, the data's tokens and labels.

Each is checked against the recipe before anything is built; a run has copies of its own, and goes on with them.
"""

import json
from pathlib import Path

from mage_ds.engine import process, run_folder, stored, wrap
from mage_ds.errors import UserError
from mage_ds.inputs.token_cache import TokenCache, brief
from mage_ds.models import Encoder, PixelViT, Vqgan
from mage_ds.recipes.schema import Recipe
from mage_ds.recipes.sections import Inputs


def sizes(info: dict) -> dict:
    return {"numbers": info["model"], "image_size": info["image_size"]}


def encoder(init: str | None, recipe: Recipe, out: Path) -> tuple[Encoder | PixelViT, dict]:
    """The trained encoder that the command line names, or the run's own, and what it is. UserError where its sizes are
    not the recipe's."""
    if init is None and not (out / "encoder").is_dir():
        raise no_init(recipe)
    path, (encoder, info) = _load_encoder(init and Path(init), recipe, out)
    check_sizes(path, info, recipe)
    return encoder, info


def no_init(recipe: Recipe) -> UserError:
    what = "a trained MAGE" if recipe.tokenizer else "a trained ViT"
    source = "its run folder, an export or a file of the authors'" if recipe.tokenizer else "mae:FILE or timm:NAME"
    wanted = _WANTED[getattr(recipe, "protocol", "decoder")].format(recipe.model.classes)
    return UserError(f"--init is missing: {wanted} the encoder of {what}; give {source}")


_WANTED = {
    "decoder": "model.classes = {} trains a decoder on",
    "probe": "protocol = probe measures",
    "finetune": "protocol = finetune begins with",
}


def check_sizes(path: Path | str, info: dict, recipe: Recipe) -> None:
    """UserError where an encoder, as `stored.load_encoder` tells of it, is not the one of the recipe."""
    asked = recipe.model.model_dump()
    if recipe.tokenizer is None:
        kind, keys = "pixel_vit", ("encoder", "patch")
    else:
        kind, keys, asked["codes"] = "encoder", ("encoder", "tokens", "codes", "vocabulary"), recipe.tokenizer.codes
    if info["kind"] != kind:
        seen = {"encoder": "tokens (leave out model.patch)", "pixel_vit": "pixels (set model.patch)"}[info["kind"]]
        raise UserError(f"--init {path}: its encoder sees {seen}; choose a recipe for that, or another --init")
    for key in keys:
        if info["model"][key] != asked[key]:
            theirs, ours = json.dumps(info["model"][key]).replace('"', ""), json.dumps(asked[key]).replace('"', "")
            where = "tokenizer" if key == "codes" and "codes" not in recipe.model.model_dump() else "model"
            raise UserError(
                f"--init {path}: its {key} is {theirs}, the recipe's {where}.{key} is {ours}; choose another MAGE, or "
                f'add "{where}.{key}={theirs}"'
            )


def opened(path: Path, recipe: Recipe) -> tuple[Encoder | PixelViT, dict]:
    """`stored.load_encoder`, for pictures of the recipe's size."""
    return stored.load_encoder(path, recipe.inputs.image_size)


def _load_encoder(init: Path | None, recipe: Recipe, out: Path) -> tuple[Path, tuple[Encoder | PixelViT, dict]]:
    """What `init` names, and `stored.load_encoder` of it; the copy in `out`, with a warning, where a run that exists
    was started with a MAGE that is no longer there, or no longer what it was. Another one is told by the facts."""
    own = out / "encoder"
    if init is None:
        return own, opened(own, recipe)
    begun = run_folder.read_facts(out) if own.is_dir() and (out / "recipe.yaml").is_file() else {}
    named = bool(begun) and begun.get("init") == str(init.resolve())
    try:
        found = opened(init, recipe)
    except UserError:
        if not begun or (init.exists() and not named):
            raise
        why = "cannot be opened any more" if init.exists() else "is not there any more"
    else:
        if not named or found[1]["hash"] == begun["encoder"]:
            return init, found
        why = "is not what it was when this run began with it"
    process.say(f"WARNING: --init {init}: {why}; this run goes on with its own copy of the encoder, {own}")
    return own, opened(own, recipe)


def labels(recipe: Recipe, data: str, *splits) -> list[str]:
    """The names of the labels. UserError where there are none, or more than the model has, and where some of the
    pictures have none: how often the decoder learns to do without is what label_dropout says."""
    names, most = splits[0].classes, recipe.model.classes
    labels = [int(split.labels.max(initial=-1)) for split in splits if split is not None]
    count = max(len(names), 1 + max(labels))
    if not names or labels[0] < 0:
        raise UserError(
            f"--data {data}: has no classes, and model.classes = {most} needs labels; sort the pictures into class "
            "folders, or give the tars .cls files"
        )
    bare = [int((split.labels < 0).sum()) if split is not None else 0 for split in splits]
    if any(bare):
        counts = " and ".join(f"{n:,} in {part}/" for n, part in zip(bare, ("train", "val"), strict=False) if n)
        raise UserError(
            f"--data {data}: of its pictures {counts} have no label, which model.classes = {most} needs of all; move "
            "them into class folders or out of the data (what is withheld on purpose is label_dropout)"
        )
    if count > most:
        raise UserError(
            f'--data {data}: has {count} classes, the recipe\'s model.classes is {most}; add "model.classes={count}"'
        )
    if count < most:
        process.say(
            f"{count} classes; model.classes = {most} leaves room for {most - count} that nothing is learned of"
        )
    return names


def warn_of_tokens(below: dict, tokenizer: str) -> None:
    """An encoder understands the codes that it was trained on; of another tokenizer they mean something else."""
    if below["tokenizer"] not in (None, tokenizer):
        process.say(
            f"WARNING: the encoder was trained with another tokenizer ({below['tokenizer'][:12]}) than this training "
            f"({tokenizer[:12]}): unless their codes are the same, it will learn little"
        )


def tokenizer(tokenizer: str | None, recipe: Recipe, out: Path) -> tuple[Vqgan, dict]:
    """The frozen tokenizer that the command line names, or the run's own; checked against the recipe."""
    if tokenizer is None and (out / "tokenizer").is_dir():
        tokenizer = out / "tokenizer"
    if tokenizer is None:
        raise UserError("--tokenizer is missing: give the run folder of `mage-ds train digits_tokenizer`, or `random`")
    if tokenizer == "random":
        vqgan = Vqgan(**recipe.tokenizer.model_dump())
        wrap.initialize_weights(vqgan, recipe.seed)
        info = {"model": recipe.tokenizer.model_dump(), "image_size": recipe.inputs.image_size}
        info["hash"] = stored.weights_hash(vqgan.state_dict())
        return vqgan.eval().requires_grad_(False), info
    vqgan, info = stored.load_tokenizer(Path(tokenizer))
    size, codes = recipe.inputs.image_size, info["model"]["codes"]
    tokens = (size // vqgan.factor) ** 2 if size % vqgan.factor == 0 else 0
    if (tokens, codes) != (recipe.model.tokens, recipe.tokenizer.codes):
        raise UserError(
            f"--tokenizer {tokenizer}: makes {tokens} tokens of {codes} codes of {size} px, the recipe's model.tokens "
            f"is {recipe.model.tokens} and tokenizer.codes {recipe.tokenizer.codes}; choose another tokenizer or recipe"
        )
    return vqgan, info


def refuse_others(cache: TokenCache, recipe: Recipe, tokenizer_hash: str, tokenizer) -> None:
    """UserError where the tokens are not those that the recipe and the tokenizer would make of the pictures."""
    made = cache.settings
    if tokenizer_hash != made["tokenizer"]:
        raise UserError(
            f"--tokenizer {tokenizer}: is not the one that made {cache.root} ({tokenizer_hash[:12]}, its tokens are of "
            f"{made['tokenizer'][:12]}); leave it out, the cache holds a copy, or tokenize the data with this one"
        )
    asked = recipe.inputs.model_dump(include={"image_size", "augmentation", "interpolation", "evaluation_resize"})
    if "val" not in made["data"]:
        del asked["evaluation_resize"]
    if keys := [key for key in asked if asked[key] != made[key]]:
        what = "; ".join(f"{key} {brief(made[key])} there, {brief(asked[key])} here" for key in keys)
        raise UserError(
            f"--data {cache.root}: its tokens were made of pictures cut otherwise than the recipe says ({what}); make "
            "others with `mage-ds tokenize --recipe RECIPE`, or change the recipe: inputs.KEY=VALUE"
        )
    refuse_changed(recipe.inputs, f"--data {cache.root}")
    if cache.views < recipe.views:
        raise UserError(
            f"--data {cache.root}: has one view of a picture, objective = {recipe.objective} compares two; make "
            "another with `mage-ds tokenize --views 10`, or train on the pictures"
        )
    bad = 1 - float(cache.valid.all(axis=1).mean())
    if bad > recipe.inputs.broken_limit:
        raise UserError(
            f"--data {cache.root}: {bad:.2%} of its pictures were unreadable, more than inputs.broken_limit="
            f"{recipe.inputs.broken_limit:g} allows ({cache.root / 'quarantine.jsonl'} lists them); raise the limit"
        )
    seed = "" if made["seed"] == recipe.seed else f" of seed {made['seed']}"
    each = ("one", "two")[recipe.views - 1]
    views = f"{cache.views} views{seed}, {each} an epoch in turn" if cache.views > 1 else f"one view{seed}"
    process.say(f"tokens of {cache.root}: {views}, made in {made['dtype']} in batches of {made['batch']}")


def refuse_changed(inputs: Inputs, where: str) -> None:
    """UserError where a recipe changes pictures otherwise than by cutting and mirroring, all that a cache holds."""
    changed = {"colour": inputs.colour is not None, "policy": inputs.policy, "crop = clamped": inputs.crop == "clamped"}
    if keys := [key for key, yes in changed.items() if yes]:
        raise UserError(
            f"{where}: the recipe's inputs.{keys[0]} changes pictures in more ways than a token cache has views of; "
            "train on the pictures"
        )


def warn_of_dtype(cache: TokenCache, precision: str) -> None:
    """A cache of another number format is of use, but live training would see some other tokens."""
    if (made := cache.settings["dtype"]) != precision:
        process.say(
            f"WARNING: the tokens of {cache.root} were made in {made}, this training is in {precision}, which would "
            f"make some of them other ones; for those: `mage-ds tokenize --precision {precision} ...`"
        )
