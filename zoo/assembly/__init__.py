"""Names in, models out: build a network by name, fuse several."""

from zoo.assembly.fusing import backbone, fuse

__all__ = ["backbone", "fuse"]
