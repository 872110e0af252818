"""What ROME, MEMIT and PMET share: contexts, learnt vectors, second moments."""
