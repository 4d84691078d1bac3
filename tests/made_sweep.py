"""A table of tiny trainings on digits, for the tests of `sweep` here and on a cluster: all but its rows."""

SIZE = '"model.encoder={depth: 1, width: 32, heads: 2}"'
MAGE = f'batch=16, {SIZE}, "model.decoder={{depth: 1, width: 32, heads: 2}}", report.log_every=1'
HEAD = f"""
title: padding
compared: tiny ones
columns: [fid, top1]
paper: {{}}
digits:
  sample: digits
  tokenizer: {{recipe: digits_tokenizer, set: [batch=16, duration.steps=2]}}
  extractor: {{recipe: digits_mage, set: [{MAGE}, duration.steps=2]}}
  reference: train
  samples: 32
  probe: {{recipe: digits_probe, set: [batch=16, duration.steps=2, {SIZE}]}}
"""
