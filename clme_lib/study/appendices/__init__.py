"""The appendices: each measurement next to its table."""
