"""RQ2: what an edit costs, measured; what it must cost, counted; and subjects with random weights to measure on."""
