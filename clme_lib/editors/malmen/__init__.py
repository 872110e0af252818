"""MALMEN: gradients, hypernetwork, training, editor."""
