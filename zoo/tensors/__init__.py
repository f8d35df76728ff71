"""Tensors in safetensors files: read as private maps, written once."""

from zoo.tensors.header import ALIGNMENT, TensorInfo, encode_header, read_header
from zoo.tensors.reading import StoredTensors, load_tensors, open_tensors
from zoo.tensors.writing import laid_out, save_tensors, sha256_file

__all__ = [
    "ALIGNMENT",
    "StoredTensors",
    "TensorInfo",
    "encode_header",
    "laid_out",
    "load_tensors",
    "open_tensors",
    "read_header",
    "save_tensors",
    "sha256_file",
]
