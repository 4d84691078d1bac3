"""Bytes on disk become batches on a device: catalog -> order, augment -> dali -> Batch."""
