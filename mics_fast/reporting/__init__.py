"""Reporting: the HTML report of a run."""
