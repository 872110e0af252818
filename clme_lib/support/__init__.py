"""What every part stands on: errors, seeds, typed configuration, cached files, appended files, memory, batches."""
