"""Training: one loop for every transfer method, and what it is made of."""

from zoo.training.loop import Transferred
from zoo.training.transferring import transfer

__all__ = ["Transferred", "transfer"]
