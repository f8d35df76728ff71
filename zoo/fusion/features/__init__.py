"""Fusions of features: from what the members give before their classifiers to one embedding, one
paper a file."""
