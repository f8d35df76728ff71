"""A Hub on loopback: model repositories, and a store for large files on a second origin.

The unmodified clients talk to it: huggingface_hub, the `hf` command, timm. Nothing is kept on
disk. What it answers was read off huggingface_hub 2.4.0; olah, a mirror by others, reads through it
as well.
"""

from hub.faults import Fault
from hub.server import Hub

__all__ = ["Fault", "Hub"]
