"""Networks: timm's, the Hub's, local ones, and small ones of our own."""

from zoo.backbones.preprocessing import Preprocessing

__all__ = ["Preprocessing"]
