"""Shared foundations: errors, typed configuration, seeds, registries, files, memory, batches."""
