"""A pre-flight: whether models merge well, from their weights alone, and by which methods."""

from merganser.advice._api import Advice, advise
from merganser.advice._data import advice_data, survey_data
from merganser.advice._findings import Finding, Level, Limits
from merganser.advice._methods import CLAIMS, Claim, Suggestion
from merganser.advice._survey import Survey, display_names, measure, survey

__all__ = [
    "CLAIMS",
    "Advice",
    "Claim",
    "Finding",
    "Level",
    "Limits",
    "Suggestion",
    "Survey",
    "advice_data",
    "advise",
    "display_names",
    "measure",
    "survey",
    "survey_data",
]
