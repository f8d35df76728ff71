"""Make a saved model again from its provenance, and compare."""

from zoo.reproducing.comparing import Difference, Reproduction
from zoo.reproducing.rerunning import reproduce

__all__ = ["Difference", "Reproduction", "reproduce"]
