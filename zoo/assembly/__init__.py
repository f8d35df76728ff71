"""Names in, models out: build a network by name, fuse several, say which fusion may work."""

from zoo.assembly.fusing import fuse
from zoo.assembly.members import backbone
from zoo.assembly.plans import Plan, plan

__all__ = ["Plan", "backbone", "fuse", "plan"]
