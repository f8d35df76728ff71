"""Permutations of a network's units: found by a trace, applied, matched between networks."""

from zoo.fusion.align.graph import Graph, Group, Place, permute
from zoo.fusion.align.tracing import trace

__all__ = ["Graph", "Group", "Place", "permute", "trace"]
