"""The command line. Handlers import what they need when they run, so that `zoo ls`, `zoo show` and
`zoo --help` start without torch."""

from zoo.cli.main import main

__all__ = ["main"]
