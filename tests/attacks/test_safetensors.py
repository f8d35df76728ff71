"""Files of weights, and indices of them, that are damaged on purpose: refused before anything is
allocated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoo.errors import FormatError
from zoo.tensors import load_tensors, open_tensors, save_tensors


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "does not start with '{'"),
        (b"[1]", b"", "does not start with '{'"),
        (b"{nonsense", b"", "holds no valid JSON: Expecting property name"),
        (b'{"a": "\xff"}', b"", "holds no valid JSON: 'utf-8' codec can't decode"),
        (b'{"\\ud800": 1}', b"", "holds no valid JSON: .* surrogates not allowed"),
        (b'{"a":' + b"[" * 100_000, b"", "holds no valid JSON: .*recursion"),
        (b'{"a": 1, "a": 2}', b"", "the key 'a' stands twice"),
        (b'{"a": {"dtype": "U8", "dtype": "U8"}}', b"", "the key 'dtype' stands twice"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ is not a mapping of strings to strings"),
        ({"__metadata__": []}, b"", "__metadata__ is not a mapping"),
        ({"a": 3}, b"", "tensor 'a' has dtype None, expected one of BOOL, U8"),
        ({"a": entry(0, 4, dtype="F12")}, b"1234", "'a' has dtype 'F12', expected one of"),
        ({"a": entry(0, 4, dtype=["U8"])}, b"1234", r"has dtype \['U8'\]"),
        ({"a": entry(0, 4, [-4])}, b"1234", r"has shape \[-4\], expected a list of counts"),
        ({"a": entry(0, 4, [4.0])}, b"1234", r"has shape \[4.0\], expected"),
        ({"a": entry(0, 1, [True])}, b"1", r"has shape \[True\], expected"),
        ({"a": entry(0, 4, 4)}, b"1234", "has shape 4, expected"),
        ({"a": entry(0, 1, [1] * 65)}, b"1", "has shape .*expected a list of counts"),
        ({"a": entry(0, 0, [0, 2**40, 2**40])}, b"", "has shape .*expected a list of counts"),
        ({"a": entry(0, 0, [0, 2**63])}, b"", "has shape .*expected a list of counts"),
        ({"a": entry(4, 0, [4])}, b"1234", r"data_offsets \[4, 0\], expected \[start, stop\]"),
        ({"a": {**entry(0, 4), "data_offsets": [0]}}, b"1234", r"data_offsets \[0\], expected"),
        ({"a": entry(-4, 0)}, b"1234", r"data_offsets \[-4, 0\], expected"),
        ({"a": entry(0, 4)}, b"123", "is cut off: tensor 'a' ends at byte .*, the file has"),
        ({"a": entry(0, 4, [2], "F32")}, b"1234", r"is F32 \[2\] and needs 8 bytes, not 4"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, b"1234", "'b' starts .*: a hole lies before it"),
        ({"a": entry(1, 4)}, b"1234", "'a' starts .*: a hole lies before it"),
        ({"a": entry(0, 3), "b": entry(2, 4)}, b"1234", "'b' starts .*: it overlaps another one"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "'b' starts .*: it overlaps another one"),
        ({"a": entry(0, 3)}, b"1234", "1 bytes follow the last tensor"),
    ],
)
def test_a_damaged_file_is_refused(
    header: object, data: bytes, message: str, tmp_path: Path
) -> None:
    path = raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(FormatError, match=message) as raised:
        open_tensors(path)
    assert raised.value.file == str(path)


def test_a_file_with_too_short_or_too_long_a_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"1234567")
    with pytest.raises(FormatError, match="is not a safetensors file: 7 bytes are too few"):
        open_tensors(path)
    raw(path, {}, length=200)
    with pytest.raises(FormatError, match=r"is cut off: its header needs 208 bytes, .* has 10"):
        open_tensors(path)
    raw(path, {}, length=25_000_001)
    with pytest.raises(FormatError, match="a header of 25,000,001 bytes, more than 25,000,000"):
        open_tensors(path)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(FormatError, match="is not a safetensors file, or not a safe one"):
        open_tensors(path)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    for name in ("model.bin", "model.pt", "model.pth", "model.ckpt"):
        with pytest.raises(FormatError, match=r"is a pickle, .* weights_only=True"):
            load_tensors(tmp_path / name)
    with pytest.raises(FormatError, match="there is no such file or folder"):
        load_tensors(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"has neither model.safetensors nor model.*index.json"):
        load_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FormatError, match=r"pytorch_model.bin: is a pickle"):
        load_tensors(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(FormatError, match=r"has both .*; name the one you mean"):
        load_tensors(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "b\\a.safetensors",
     "C:a.safetensors", "..", "", ".safetensors", "a.bin", "a\0.safetensors", 3, None],
)  # fmt: skip
def test_an_index_names_only_safetensors_files_beside_it(name: object, tmp_path: Path) -> None:
    save_tensors({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "sub").mkdir()
    index = tmp_path / "sub" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(FormatError, match=r"puts tensor 'w' into .*file in the same folder"):
        load_tensors(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no valid JSON"),
        ("[]", "holds a JSON list, expected an object"),
        ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "key 'w' stands twice"),
        ("{}", "has no weight_map, or its metadata is not an object"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}, "metadata": 3}', "its metadata is not an object"),
        (" " * 25_000_001, "is larger than 25,000,000 bytes; that is no index"),
    ],
    ids=range(7),
)
def test_a_damaged_index_is_refused(text: str, message: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(FormatError, match=message):
        load_tensors(tmp_path)
