"""Fusions of weights: pure functions on tensors, one paper a file."""
