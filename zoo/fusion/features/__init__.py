"""Fusions of features: from the members' pooled features to one embedding, one paper a file."""
