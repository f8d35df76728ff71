"""Members whose weights stay in repositories of their own: `config.json` has a pointer to each.

A pointer comes from anywhere. It names a repository on the Hub, a full commit and the hashes of
the files of weights, and nothing else is taken from there: no config, so that a pointer never
leads to another pointer.
"""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import BadName, FormatError, WeightsError
from zoo.model import Inner, Model
from zoo.names import Address, parse
from zoo.store.contents import WEIGHTS
from zoo.store.fetching import hub_folder, side_by_side
from zoo.store.hashes import sha256_of
from zoo.tensors import load_tensors, open_tensors

INDEX = WEIGHTS + ".index.json"
MOST = 64  # members that are linked: each may be a download
_MOST_FILES = 1000  # of one member: shards and their index
# Bytes that a repository may have beside four times the member's: a classifier that a fusion does
# without, another dtype.
_BESIDE = 128_000_000
_PATH = re.compile(r"members\.\d{1,4}\.net(\.members\.\d{1,4}\.net){0,7}")
_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What a comparison needs of a repository; the Hub's client matches these against whole names.
_WEIGHTS = (WEIGHTS, INDEX, "model-?????-of-?????.safetensors")


@dataclass(frozen=True, kw_only=True)
class Link:
    """Where the weights of a member lie. member: its name. address: with a full commit. sha256:
    file name → hash of all files that they lie in. size: bytes of the member's tensors."""

    member: str
    address: Address
    sha256: Mapping[str, str]
    size: int

    @property
    def origin(self) -> dict[str, str]:
        """Repository and commit, as a source tells them."""
        return {"repository": self.address.location, "revision": str(self.address.revision)}

    @property
    def entry(self) -> str:
        """The file to open: the weights, or the index of their shards."""
        return INDEX if INDEX in self.sha256 else WEIGHTS

    def as_dict(self) -> dict[str, Any]:
        return {"member": self.member, **self.origin, "sha256": dict(self.sha256),
                "bytes": self.size}


def read_links(file: Path, described: Any) -> dict[str, Link]:
    """The pointers of a config by the path of their member (`members.0.net`), checked.

    described: what stands under `zoo`. Raises FormatError naming the file for what is no pointer.
    """
    told = described.get("links") if isinstance(described, dict) else None
    if told is None:
        return {}
    if not isinstance(told, dict) or not told or len(told) > MOST:
        raise FormatError(file, f"is damaged: its links are no mapping of 1 to {MOST} members")
    paths = sorted(map(str, told))
    for path in paths:
        if not _PATH.fullmatch(path) or not _is_member(described.get("model"), path):
            raise FormatError(file, f"links {path!r}, which is no member of the model")
        inside = next((each for each in paths if path.startswith(f"{each}.")), None)
        if inside:
            raise FormatError(file, f"links {path!r}, which is inside of {inside!r}")
    links = {path: _link(file, path, told[path]) for path in paths}
    hashes: dict[Address, Mapping[str, str]] = {}
    for link in links.values():
        if hashes.setdefault(link.address, link.sha256) != link.sha256:
            raise FormatError(file, f"links two members to {link.address} with different hashes")
    return links


def fetch_links(
    place: object, links: Mapping[str, Link], wanted: Mapping[str, Tensor]
) -> dict[Address, list[Path]]:
    """The files of weights that are pointed to; each repository is fetched once, side by side.

    place: the model that points to them, for errors. wanted: its state, on any device; what is far
    larger than the member is not fetched. Raises WeightsError naming member and repository when
    one cannot be had or is not what it was.
    """
    first = {link.address: link for link in reversed(list(links.values()))}
    most: dict[Address, int] = {}
    for path, link in links.items():
        size = sum(tensor.nbytes for key, tensor in wanted.items()
                   if key.startswith(f"{path}."))
        most[link.address] = max(most.get(link.address, 0), _BESIDE + 4 * size)
    return side_by_side({address: partial(_fetch, place, link, most[address])
                         for address, link in first.items()})


def linked_tensors(
    links: Mapping[str, Link], fetched: Mapping[Address, Sequence[Path]],
    wanted: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors of all linked members, mapped, under the names that the model has for them.

    fetched: what `fetch_links` gave. wanted: the model's state; what else a repository has, such as
    a classifier that the fusion does without, is left. Raises FormatError when they do not fit.
    """
    tensors: dict[str, Tensor] = {}
    for path, link in links.items():
        # Mapped for each member: two of the same repository must not share their parameters.
        stored = open_tensors(fetched[link.address][0].parent / link.entry)
        strangers = {file.name for file in stored.files} - link.sha256.keys()
        if strangers:
            raise FormatError(str(link.address), f"has weights in {min(strangers)}, of which the "
                              f"link of member {link.member} has no sha256")
        found = load_tensors(fetched[link.address][0].parent / link.entry)
        for key, like in wanted.items():
            name = key.removeprefix(f"{path}.")
            if name == key:
                continue
            if name not in found:
                raise FormatError(str(link.address), f"is not member {link.member}: tensor "
                                  f"{name!r} is missing")
            if found[name].shape != like.shape:
                raise FormatError(str(link.address), f"is not member {link.member}: tensor "
                                  f"{name!r} is {list(found[name].shape)}, expected "
                                  f"{list(like.shape)}")
            tensors[key] = found[name]
    return tensors


def links_of(model: Model) -> dict[str, Link]:
    """Pointers to the members whose weights are those of a repository at a commit, bit for bit, by
    path. Warns of each other member, and says why it has to be carried."""
    links: dict[str, Link] = {}
    left: list[str] = []
    if model.kind == "single":
        left.append(f"{model.name} (it is one network, and members of a fusion of features or "
                    "outputs are linked)")
    sources = model.recipe.get("sources")
    for path, name, net, told in _members(model, "", sources) if model.kind != "single" else ():
        if any(path.startswith(f"{each}.") for each in links):
            continue  # inside of one that is linked as a whole
        why = "no repository and commit are known of it"
        for address in _addresses(told):
            link, why = _compared(name, net, address)
            if link is not None and len(links) < MOST:
                links[path] = link
                break
        if path not in links and not isinstance(net, Model):
            left.append(f"{name} ({why or f'no more than {MOST} are linked'})")
    if left:
        warnings.warn(f"not linked, and carried: {'; '.join(left)}", stacklevel=3)
    return links


def _is_member(model: Any, path: str) -> bool:
    """Whether the config describes a fusion of features or outputs with such a member."""
    for number in map(int, re.findall(r"\d+", path)):
        try:
            if model["fusion"]["kind"] == "weights":
                return False
            described = model["members"][number]
        except (KeyError, IndexError, TypeError):
            return False
        model = described.get("model") if isinstance(described, dict) else None
    return True


def _link(file: Path, path: str, told: Any) -> Link:
    # `utils` has validate_repo_id and does not list it for type checkers.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    def damaged(what: str) -> FormatError:
        return FormatError(file, f"links {path} to {what}")

    if not isinstance(told, dict):
        raise damaged("what is no JSON object")
    repository, revision = told.get("repository"), told.get("revision")
    try:
        address = parse(f"hf-hub:{repository}")
        validate_repo_id(repository)
    except (BadName, HFValidationError):
        address = Path()
    if (not isinstance(repository, str) or not isinstance(address, Address)
            or "/" not in address.location or address.revision is not None):
        raise damaged(f"{repository!r}, expected org/name on the Hub")
    if not isinstance(revision, str) or not _COMMIT.fullmatch(revision):
        raise damaged(f"revision {revision!r}, expected a commit of 40 hexadecimal digits")
    hashes = told.get("sha256")
    if (not isinstance(hashes, dict) or not hashes
            or not all(_FILE.fullmatch(name) for name in hashes)
            or not hashes.keys() & {WEIGHTS, INDEX} or len(hashes) > _MOST_FILES):
        raise damaged(f"the files {reprlib.repr(hashes)}, expected {WEIGHTS}, or its index and "
                      f"shards, {_MOST_FILES:,} at most, each with its sha256")
    for name, hash_ in hashes.items():
        if not isinstance(hash_, str) or not _SHA256.fullmatch(hash_):
            raise damaged(f"{name} with sha256 {hash_!r}, expected 64 hexadecimal digits")
    size = told.get("bytes")
    return Link(member=str(told.get("member")), sha256=hashes,
                address=Address("hf-hub", repository, revision),
                size=size if type(size) is int and size >= 0 else 0)


def _fetch(
    place: object, link: Link, most: int, *, quiet: bool = False
) -> list[Path]:
    try:
        folder, _ = hub_folder(link.address, quiet=quiet, only=link.sha256, most=most)
    except WeightsError as error:
        problem = str(error)
    else:
        return [folder / name for name in link.sha256]
    raise WeightsError(f"member {link.member} of {place} lies in another repository: {problem}")


def _members(
    model: Model, above: str, recipe: Any
) -> Iterator[tuple[str, str, Any, Sequence[Any]]]:
    """Path, name, network and what is told of the source of each member, and of those in them."""
    told = recipe if isinstance(recipe, list) and len(recipe) == len(model.members) else ()
    for number, member in enumerate(model.each_member()):
        path = f"{above}members.{number}.net"
        source = told[number] if told and isinstance(told[number], Mapping) else {}
        inside = [each.source for each in member.net.each_member()] if isinstance(
            member, Inner) else []
        yield path, member.name, member.net, [member.source, source, *inside]
        if isinstance(member, Inner):
            made = source.get("recipe")
            inner = made.get("sources") if isinstance(made, Mapping) else None
            yield from _members(member.net, f"{path}.", inner)


def _addresses(sources: Sequence[Any]) -> list[Address]:
    """The repositories, each at a commit, that a member may be from."""
    found = [Address("hf-hub", str(each.get("repository")), str(each.get("revision")))
             for each in sources if each.get("repository")]
    return [address for address in dict.fromkeys(found)
            if "/" in address.location and _COMMIT.fullmatch(str(address.revision))]


def _compared(name: str, net: torch.nn.Module, address: Address) -> tuple[Link | None, str]:
    """A pointer, where the repository has the very same tensors; otherwise why not."""
    try:
        folder, _ = hub_folder(address, only=dict.fromkeys(_WEIGHTS, ""))
        stored = open_tensors(folder)
    except (WeightsError, FormatError) as error:
        return None, str(error)
    state = net.state_dict()
    for key, tensor in state.items():
        if key not in stored or stored.shape(key) != tuple(tensor.shape) or not _same(
                tensor, stored[key]):
            return None, (f"its weights are not those of {address.location}: it was trained, or "
                          "built otherwise")
    files = [*stored.files, *([folder / INDEX] if not (folder / WEIGHTS).is_file() else [])]
    return Link(member=name, address=address,
                sha256={file.name: sha256_of(file) for file in files},
                size=sum(tensor.nbytes for tensor in state.values())), ""


def _same(one: Tensor, other: Tensor) -> bool:
    one = one.detach().cpu()
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(
            torch.uint8))
