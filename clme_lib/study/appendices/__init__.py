"""The appendices: each module has a measurement and its tables."""
