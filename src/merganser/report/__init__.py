"""Reports: one HTML file with the pictures of a merge, an evaluation, a search or a benchmark."""

from merganser.report._api import Report, write_report

__all__ = ["Report", "write_report"]
