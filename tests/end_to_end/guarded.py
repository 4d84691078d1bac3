"""Started by test_real_parts.py on each rank: trains and samples with every way around DALI and DeepSpeed closed.

Arguments: a folder for the reports, then (with the launcher's --local_rank anywhere) JSON lists of command lines.
"""

import io
import json
import os
import sys
from pathlib import Path

import deepspeed
import nvidia.dali
import torch
import torchvision
from PIL import Image, ImageFile
from torch.nn.modules import module as hooks

from mage_ds import cli

stream = io.BytesIO()
Image.new("RGB", (8, 8)).save(stream, "jpeg")
JPEG = stream.getvalue()
count = {"train": 0, "inference": 0, "dali": 0}
engines, inside, guarded = [], [], set()


def refuse(*args, **kwargs):
    raise AssertionError("a picture is decoded, and not by DALI")


def guard(start, kind):
    """`deepspeed.initialize` or `init_inference`, whose engine alone may call its module from then on."""

    def started(*args, **kwargs):
        made = start(*args, **kwargs)
        engine = made[0] if isinstance(made, tuple) else made
        engines.append((kind, engine))
        guarded.update(engine.module.modules())
        own, module = engine.forward, engine.module.forward

        def forward(*args, **kwargs):
            count[kind] += 1
            inside.append(engine)
            try:
                return own(*args, **kwargs)
            finally:
                inside.pop()

        def checked(*args, **kwargs):
            assert inside, "the module's forward is called around its engine"
            return module(*args, **kwargs)

        engine.forward, engine.module.forward = forward, checked
        return made

    return started


def check_call(module, args):
    assert inside or module not in guarded, f"{type(module).__name__} is called around its engine"


def count_dali(run):
    def counted(*args, **kwargs):
        count["dali"] += 1
        return run(*args, **kwargs)

    return counted


def raises(action) -> bool:
    try:
        action()
    except AssertionError:
        return True
    return False


folder, *lines = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
ImageFile.ImageFile.load = refuse  # headers may be read, and made pictures drawn and written
torchvision.io.decode_image = torchvision.io.decode_jpeg = torchvision.io.read_image = refuse
deepspeed.initialize = guard(deepspeed.initialize, "train")
deepspeed.init_inference = guard(deepspeed.init_inference, "inference")
hooks.register_module_forward_pre_hook(check_call)
nvidia.dali.Pipeline.run = count_dali(nvidia.dali.Pipeline.run)

codes = [cli.main(json.loads(line)) for line in lines]
trained = next(engine for kind, engine in engines if kind == "train")
state = trained.optimizer.optimizer.state
report = {
    "codes": codes,
    **count,
    "parameters": sum(p.numel() for p in trained.module.parameters()),
    "moments": {
        key: sum(own[key].numel() for own in state.values() if key in own) for key in ("exp_avg", "exp_avg_sq")
    },
    "moments_moved": any(bool(own["exp_avg"].any()) for own in state.values()),
    "stage": trained.zero_optimization_stage(),
    "guards": [
        raises(lambda: trained.module()),
        raises(lambda: trained.module.forward()),
        raises(lambda: next(m for m in trained.module.modules() if isinstance(m, torch.nn.Linear))(None)),
        raises(lambda: Image.open(io.BytesIO(JPEG)).load()),
    ],
}
(Path(folder) / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(report))
