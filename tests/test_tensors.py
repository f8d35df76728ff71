"""zoo.tensors: what is written is read back, by us and by others; nothing else is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from zoo.errors import DiskFull, FormatError, OptionError
from zoo.tensors import load_tensors, open_tensors, save_tensors, sha256_file
from zoo.tensors.header import DTYPES

DISK = namedtuple("DISK", "total used free")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def random_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "conv.bias": torch.randn(4),
        "half": torch.randn(5).half(),
        "norm.count": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(0, 3),
    }


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert got[key].dtype == tensor.dtype
        assert torch.equal(got[key], tensor), key


# Round trips


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_and_plain_safetensors_reads_it(name: str, tmp_path: Path) -> None:
    tensor = torch.arange(48, dtype=torch.uint8).remainder(2).view(DTYPES[name]).view(-1, 2)
    path = tmp_path / "t.safetensors"
    save_tensors({"t": tensor}, path)
    for loaded in (load_tensors(path)["t"], safetensors.torch.load_file(path)["t"]):
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))


def test_scalars_empty_and_scattered_tensors_come_back(tmp_path: Path) -> None:
    state = random_state()
    state["columns"] = torch.randn(6, 4)[:, ::2]
    state["expanded"] = torch.randn(3, 1).expand(3, 5)
    state["nhwc"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state["conjugated"] = torch.randn(3, dtype=torch.complex64).conj()
    state["parameter"] = nn.Parameter(torch.randn(2))
    path = tmp_path / "model.safetensors"
    save_tensors(state, path)
    assert_equal(load_tensors(path), state)
    assert_equal(load_tensors(tmp_path), state)
    assert_equal(safetensors.torch.load_file(path), state)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    save_tensors({}, tmp_path / "model.safetensors")
    assert load_tensors(tmp_path) == {}


def test_files_that_plain_safetensors_writes_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(random_state(), tmp_path / "model.safetensors", {"author": "me"})
    assert_equal(load_tensors(tmp_path), random_state())
    assert open_tensors(tmp_path).metadata == {"author": "me"}


def test_the_same_tensors_give_the_same_bytes_and_their_hash(tmp_path: Path) -> None:
    state = random_state()
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    hashes = save_tensors(state, one, metadata={"b": "1", "a": "2", "format": "tf"})
    save_tensors(dict(reversed(state.items())), other, metadata={"a": "2", "b": "1"})
    assert one.read_bytes() == other.read_bytes()
    digest = hashlib.sha256(one.read_bytes()).hexdigest()
    assert hashes == {"one.safetensors": digest}
    assert sha256_file(one) == digest
    assert int.from_bytes(one.read_bytes()[:8], "little") % 64 == 56  # whole lines of the cache
    assert open_tensors(one).metadata == {"a": "2", "b": "1", "format": "pt"}
    assert list(open_tensors(one)) == [
        "none", "norm.count", "conv.bias", "conv.weight", "half", "mask"
    ]  # fmt: skip


# Reading


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(random_state(), path)
    before = sha256_file(path)
    loaded = load_tensors(path)["conv.weight"]
    loaded.zero_()
    assert sha256_file(path) == before
    assert load_tensors(path)["conv.weight"].abs().sum() > 0


def test_saving_over_a_loaded_file_leaves_the_loaded_tensors_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(random_state(), path)
    loaded = load_tensors(path)
    save_tensors({"other": torch.zeros(1)}, path)
    assert_equal(loaded, random_state())


def test_parts_of_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weight = random_state()["conv.weight"]
    save_tensors(random_state(), path)
    stored = open_tensors(path)
    assert (stored.shape("conv.weight"), stored.dtype("half")) == ((4, 3, 3, 3), torch.float16)
    assert torch.equal(stored.slice("conv.weight", 5, 20), weight.flatten()[5:20])
    assert torch.equal(stored.slice("conv.weight", 100), weight.flatten()[100:])
    assert stored.slice("conv.weight", 3, 3).shape == (0,)
    assert (len(stored), "half" in stored, "whole" in stored) == (6, True, False)
    for start, stop in ((-1, 3), (3, 2), (0, 109)):
        with pytest.raises(IndexError, match=rf"elements {start}…{stop} of 'conv.weight', .* 108"):
            stored.slice("conv.weight", start, stop)


def test_a_loaded_tensor_owns_no_more_than_its_bytes(tmp_path: Path) -> None:
    """A view of one large storage would drag the whole file along when it is copied or sent."""
    save_tensors(random_state(), tmp_path / "model.safetensors")
    assert load_tensors(tmp_path)["conv.bias"].untyped_storage().nbytes() == 16


# Ties


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.tokens.weight


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    model, path = Tied(), tmp_path / "model.safetensors"
    save_tensors(model.state_dict(), path)
    assert safetensors.torch.load_file(path).keys() == {"head.weight"}
    stored = open_tensors(path)
    assert (stored.aliases, stored.metadata) == ({"tokens.weight": "head.weight"}, {"format": "pt"})
    loaded = load_tensors(path)
    assert_equal(loaded, model.state_dict())
    assert loaded["tokens.weight"] is loaded["head.weight"]
    assert stored.shape("tokens.weight") == (5, 3)

    save_tensors(stored, tmp_path / "copy.safetensors", metadata=stored.metadata)
    assert sha256_file(tmp_path / "copy.safetensors") == sha256_file(path)


def test_safetensors_and_we_read_each_others_ties(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    save_tensors(model.state_dict(), tmp_path / "ours.safetensors")
    safetensors.torch.load_model(other, tmp_path / "ours.safetensors")
    assert torch.equal(other.tokens.weight, model.tokens.weight)
    safetensors.torch.save_model(model, str(tmp_path / "theirs.safetensors"))
    assert_equal(load_tensors(tmp_path / "theirs.safetensors"), model.state_dict())


def test_tensors_that_only_overlap_are_stored_apart(tmp_path: Path) -> None:
    whole = torch.randn(4, 4)
    bits = torch.randn(2, dtype=torch.complex64)
    state = {"whole": whole, "half": whole[:2], "turned": whole.t(), "int": whole.view(torch.int32)}
    state |= {"plain": bits, "conjugated": bits.conj(), "e1": whole[:0], "e2": whole[:0]}
    save_tensors(state, tmp_path / "model.safetensors")
    assert open_tensors(tmp_path).aliases == {}
    assert_equal(load_tensors(tmp_path), state)


def test_a_tie_whose_name_is_taken_in_the_metadata_is_stored_twice(tmp_path: Path) -> None:
    state = {"a": (weight := torch.randn(3)), "format": weight, "note": weight}
    save_tensors(state, tmp_path / "model.safetensors", metadata={"note": "mine"})
    stored = open_tensors(tmp_path)
    assert (stored.aliases, stored.metadata) == ({}, {"format": "pt", "note": "mine"})
    assert_equal(load_tensors(tmp_path), state)


def test_the_format_is_no_tie(tmp_path: Path) -> None:
    save_tensors({"pt": torch.ones(1)}, tmp_path / "model.safetensors")
    assert load_tensors(tmp_path).keys() == {"pt"}


# Shards


def save_sharded(folder: Path) -> dict[str, Tensor]:
    state = {f"layer.{i}": torch.full((10,), float(i)) for i in range(5)}
    state |= {"layer.9": torch.randn(100), "tied": state["layer.0"]}
    hashes = save_tensors(
        state, folder / "model.safetensors", metadata={"by": "me"}, max_shard_bytes=100
    )
    assert hashes == {path.name: sha256_file(path) for path in folder.iterdir()}
    return state


def test_shards_and_their_index(tmp_path: Path) -> None:
    state = save_sharded(tmp_path)
    shards = [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"by": "me", "format": "pt", "tied": "layer.0", "total_size": 600},
        "weight_map": {
            "layer.0": shards[0], "layer.1": shards[0], "layer.2": shards[1],
            "layer.3": shards[1], "layer.4": shards[2], "layer.9": shards[3],
        },
    }  # fmt: skip
    assert_equal(load_tensors(tmp_path), state)
    assert_equal(load_tensors(tmp_path / "model.safetensors.index.json"), state)
    stored = open_tensors(tmp_path)
    assert stored.metadata == {"by": "me", "format": "pt"}
    assert stored.files == tuple(tmp_path / shard for shard in shards)
    assert safetensors.torch.load_file(tmp_path / shards[0]).keys() == {"layer.0", "layer.1"}


def test_tensors_that_fit_are_not_sharded(tmp_path: Path) -> None:
    hashes = save_tensors(random_state(), tmp_path / "model.safetensors", max_shard_bytes=10**6)
    assert hashes.keys() == {"model.safetensors"}
    assert_equal(load_tensors(tmp_path), random_state())


def test_shards_that_do_not_fit_the_index_are_refused(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    first = tmp_path / "model-00001-of-00004.safetensors"
    second = tmp_path / "model-00002-of-00004.safetensors"
    save_tensors({"layer.0": torch.ones(1)}, first)
    with pytest.raises(FormatError, match=r"tensor 'layer.1' is not in it"):
        load_tensors(tmp_path)
    save_tensors({key: torch.ones(1) for key in ("layer.0", "layer.1", "layer.3")}, first)
    with pytest.raises(FormatError, match=r"tensor 'layer.3' is in it and not in the index"):
        load_tensors(tmp_path)
    save_tensors({"layer.0": torch.ones(1), "layer.1": torch.ones(1)}, first)
    second.unlink()
    with pytest.raises(FormatError, match=f"needs {second.name} for 'layer.2'; it is missing"):
        load_tensors(tmp_path)


# Writing


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"__metadata__": torch.ones(1)}, {}, "a tensor is named '__metadata__', expected other"),
        ({3: torch.ones(1)}, {}, "a tensor is named 3, expected other text"),
        ({"\ud800": torch.ones(1)}, {}, r"a tensor is named '\\ud800', expected other text"),
        ({"a": [1.0]}, {}, "'a' is a list, expected a tensor"),
        ({"a": torch.ones(1, device="meta")}, {}, "'a' is on the meta device and has no values"),
        ({"a": torch.ones(2).to_sparse()}, {}, r"'a' is torch.sparse_coo; call .to_dense\(\)"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, {}, "has no torch.complex128, .* of 'a'"),
        ({"a": torch.ones(1)}, {"n": 3}, "metadata 'n' is 3; both must be text"),
        ({"a": torch.ones(1)}, {"n": "a"}, "metadata 'n' is 'a', a tensor's name, and would read"),
        ({"a": torch.ones(1)}, {"n": "x" * 25_000_000}, "take 25,.* bytes, more than 25,000,000"),
    ],
    ids=range(10),
)
def test_what_safetensors_cannot_hold_is_refused(
    tensors: dict[str, Tensor], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        save_tensors(tensors, tmp_path / "model.safetensors", metadata=metadata)
    assert names(tmp_path) == []


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a safetensors file ends in '.safetensors'"):
        save_tensors({}, tmp_path / "model.bin")
    with pytest.raises(OptionError, match="max_shard_bytes is 0, expected 1…"):
        save_tensors({}, tmp_path / "model.safetensors", max_shard_bytes=0)


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DISK(2000, 1000, 1000))
    state = {"a": torch.ones(251), "tied": torch.ones(1)}
    with pytest.raises(DiskFull, match="1,008 bytes are to be written and the disk has 1,000 left"):
        save_tensors(state, tmp_path / "model.safetensors")
    assert names(tmp_path) == []


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file that somebody else wrote."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_tensors_at_odd_addresses_are_copied(tmp_path: Path) -> None:
    numbers = torch.tensor([1.5, -2.0, 3.0])
    data = b"\x01" + numbers.view(torch.uint8).numpy().tobytes()
    path = raw(tmp_path / "x.st", {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]}}, data)
    loaded = load_tensors(path)["b"]
    assert torch.equal(loaded, numbers)
    assert loaded.data_ptr() % 4 == 0


def test_a_file_larger_than_memory_opens(tmp_path: Path) -> None:
    size = 2**42
    path = raw(tmp_path / "large.safetensors",
               {"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)  # a hole: takes no space
    assert open_tensors(path).slice("t", size - 2).tolist() == [0, 0]
