"""What every part stands on: errors, typed configuration, seeds, registries, files, memory, batches."""
