"""The editors, one file each, and their shared code."""
