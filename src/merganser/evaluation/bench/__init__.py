"""Suites of experiments: experts that are fine-tuned, merged, tuned and measured beside what is no merge."""

from merganser.evaluation.bench._bench import bench
from merganser.evaluation.bench._suite import Suite, read_suite

__all__ = ["Suite", "bench", "read_suite"]
