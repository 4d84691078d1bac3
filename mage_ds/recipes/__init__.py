"""Recipes: every number of a training, as YAML, read strictly. The files lie in the folders beside."""

from mage_ds.recipes.load import augmentations, dump, load_recipe, recipe_file, recipe_names, resolve, schedule
from mage_ds.recipes.schema import ClassifyRecipe, PretrainRecipe, Recipe, TokenizerRecipe
from mage_ds.recipes.sections import Duration

__all__ = [
    "ClassifyRecipe",
    "Duration",
    "PretrainRecipe",
    "Recipe",
    "TokenizerRecipe",
    "augmentations",
    "dump",
    "load_recipe",
    "recipe_file",
    "recipe_names",
    "resolve",
    "schedule",
]
