"""Recipe → the four steps: source, target, fused, updated."""

from zoo.pipeline.running import Run, run

__all__ = ["Run", "run"]
