"""Trade-offs between tasks: surrogates of scores, samples to fit them on, and Pareto fronts of what they predict."""

from merganser.pareto._front import Front, check_preferences, grid_points, non_dominated, spread
from merganser.pareto._nsga3 import nsga3, reference_points
from merganser.pareto._sampling import from_spherical, sample_points, to_spherical, uncertain_points
from merganser.pareto._surrogate import ACTIVATIONS, Surrogate, features, fit

__all__ = [
    "ACTIVATIONS",
    "Front",
    "Surrogate",
    "check_preferences",
    "features",
    "fit",
    "from_spherical",
    "grid_points",
    "non_dominated",
    "nsga3",
    "reference_points",
    "sample_points",
    "spread",
    "to_spherical",
    "uncertain_points",
]
