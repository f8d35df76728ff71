"""Files of weights in, files of weights out: no network is built, any safetensors will do."""

from zoo.merge_files.merging import merge

__all__ = ["merge"]
