"""Recipes: the grammar of the files, their settings, and what they all become."""

from merganser.recipe._document import recipe_data, recipe_from
from merganser.recipe._documents import place_in, read_document, validated
from merganser.recipe._dtype import parse_dtype
from merganser.recipe._load import load_recipe
from merganser.recipe._mergekit import Imported, import_mergekit, load_mergekit
from merganser.recipe._recipe import Recipe, Rule, Slice, Source, filters_of, same_model
from merganser.recipe._settings import Parameters, Setting, constant
from merganser.recipe._simple import simple_recipe
from merganser.recipe._yaml import Document, parse_scalar, parse_yaml

__all__ = [
    "Document",
    "Imported",
    "Parameters",
    "Recipe",
    "Rule",
    "Setting",
    "Slice",
    "Source",
    "constant",
    "filters_of",
    "import_mergekit",
    "load_mergekit",
    "load_recipe",
    "parse_dtype",
    "parse_scalar",
    "parse_yaml",
    "place_in",
    "read_document",
    "recipe_data",
    "recipe_from",
    "same_model",
    "simple_recipe",
    "validated",
]
