"""Measures of what was written."""
