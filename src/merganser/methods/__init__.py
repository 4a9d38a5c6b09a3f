"""The merge methods, one file each, and the registry that knows them by name."""

from merganser.methods._base import About, Method
from merganser.methods._block import Block, BlockKey, Context, Mend, TransformedBlock, TransformedContext
from merganser.methods._compose import AsMerged, Composed
from merganser.methods._options import (
    Tensors,
    list_option,
    method_option,
    option,
    option_info,
    option_name,
    per_model,
    tensors_option,
)
from merganser.methods._registry import all_methods, canonical_option, create_method, find_method, given_name
from merganser.methods._search import Choice, Search, Trials
from merganser.methods._sequential import Sequential, Visit

__all__ = [
    "About",
    "AsMerged",
    "Block",
    "BlockKey",
    "Choice",
    "Composed",
    "Context",
    "Mend",
    "Method",
    "Search",
    "Sequential",
    "Tensors",
    "TransformedBlock",
    "TransformedContext",
    "Trials",
    "Visit",
    "all_methods",
    "canonical_option",
    "create_method",
    "find_method",
    "given_name",
    "list_option",
    "method_option",
    "option",
    "option_info",
    "option_name",
    "per_model",
    "tensors_option",
]
