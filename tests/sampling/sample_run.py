"""Started by test_sample_task.py: `sample` on a run folder, with a count of what ran. Arguments: JSON lines' file."""

import json
import resource
import sys
from pathlib import Path

import deepspeed
from PIL import Image

from mage_ds.engine import inference
from mage_ds.errors import UserError
from mage_ds.tasks.sample import sample

calls = {"engine": 0, "module": 0}
made = inference.engine


def counted(model, dtype):
    engine = made(model, dtype)
    assert isinstance(engine, deepspeed.inference.engine.InferenceEngine)
    assert not engine.module.training and next(engine.module.parameters()).dtype == dtype
    engine.register_forward_hook(lambda *_: calls.update(engine=calls["engine"] + 1))
    engine.module.register_forward_hook(lambda *_: calls.update(module=calls["module"] + 1))
    return engine


def refuse(*args, **kwargs):
    raise AssertionError("sampling needs no picture decoder")


resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # so that a batch can be too large
inference.engine = counted
Image.open = refuse
for line in Path(sys.argv[1]).read_text().splitlines():
    calls.update(engine=0, module=0)
    try:
        sample(**json.loads(line))
        error = None
    except UserError as said:
        error = str(said)
    print("RESULT " + json.dumps({**calls, "error": error}), flush=True)
