"""Iterative parallel decoding (paper.md 5): the schedule, the decoding loop, regions to edit, and who makes what."""
