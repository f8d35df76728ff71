"""Make a saved model again from its provenance, and compare."""

from zoo.reproducing.comparing import Choice, Difference, Reproduction
from zoo.reproducing.rerunning import reproduce

__all__ = ["Choice", "Difference", "Reproduction", "reproduce"]
