"""Figures that say how good pictures are."""
