"""Permutations of a network's units: found by a trace, applied, matched between networks."""

from zoo.fusion.align.activation_matching import match_activations
from zoo.fusion.align.graph import Graph, Group, Place, permute
from zoo.fusion.align.tracing import trace
from zoo.fusion.align.weight_matching import match_weights

__all__ = ["Graph", "Group", "Place", "match_activations", "match_weights", "permute", "trace"]
