"""Fusions of outputs: from the members' logits to log-probabilities, one paper a file."""
