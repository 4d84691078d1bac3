"""Iterative parallel decoding (paper.md 5): the schedule, the decoding loop, and who makes which picture."""
