"""What of a folder goes to the Hub: weights, config, card, pictures, and nothing else."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from zoo.atomic import current_folder, leads_outside
from zoo.errors import HubError, ZooError
from zoo.model import Model
from zoo.store import load, read_config, save
from zoo.store.card import published
from zoo.store.contents import CARD, CONFIG, is_ignored, is_licence, is_published
from zoo.store.fetching import origin_of, recorded_hashes
from zoo.store.folders import card_of
from zoo.store.hashes import git_oid, sha256_of
from zoo.store.licences import terms
from zoo.store.links import Link, read_links
from zoo.tensors import open_tensors
from zoo.tensors.reading import PICKLES


@dataclass(frozen=True)
class Upload:
    """One file as it is to stand in the repository. content: where it lies, or the bytes."""

    name: str
    size: int
    sha256: str
    content: Path | bytes

    @property
    def oid(self) -> str:
        """What git calls it. Reads the file: for those that are not large."""
        content = self.content
        return git_oid(content if isinstance(content, bytes) else content.read_bytes())


@contextmanager
def folder_of(
    model: Model | str | Path, repository: str, link_members: bool
) -> Iterator[Path]:
    """The folder that is given, or one for as long as the block lasts with the model saved.

    Raises HubError for a folder that is to be saved anew and has a card that would be lost, or a
    file that has no business on the Hub.
    """
    if not isinstance(model, (Model, str, Path)):
        raise ZooError(f"push takes a zoo.Model or the folder of one, and a "
                       f"{type(model).__name__} is neither")
    folder = None if isinstance(model, Model) else current_folder(Path(model).expanduser())
    if folder is not None and (not link_members or links_in(folder)):
        yield folder
        return
    with TemporaryDirectory(prefix="zoo-push-") as place:
        out = Path(place) / "model"
        if folder is None:
            assert isinstance(model, Model)
            yield save(model, out, link_members=link_members)
            return
        _want_only_a_model(folder, repository)
        whole = load(str(folder), device="cpu")
        _want_plain_card(folder, whole, repository)
        shards = open_tensors(folder).files
        save(whole, out, link_members=link_members,
             max_shard_bytes=max(file.stat().st_size for file in shards) if shards[1:] else None)
        for file in folder.iterdir():
            if is_licence(file.name):
                shutil.copyfile(file, out / file.name)
        yield out


def links_in(folder: Path) -> list[Link]:
    """The members that a folder links to. Raises FormatError for what is no pointer."""
    return list(read_links(folder / CONFIG, read_config(folder).get("zoo")).values())


def _want_plain_card(folder: Path, model: Model, repository: str) -> None:
    """Whether the card says nothing that the one of the linked model would not say."""
    if not (folder / CARD).is_file():
        return
    told = (folder / CARD).read_text("utf-8")
    plain = card_of(folder, model)
    known = [plain]
    if plain is not None:  # or as an earlier push, from which it was pulled, made of it
        origin = origin_of(folder)
        there = origin.get("repository", repository)
        known.append(published(plain, there, None))
        if any(terms(read_config(folder)["zoo"]["made_with"])):  # its licence is put anew
            known.append(published(plain, there, origin.get("license")))
    if told not in known:
        raise HubError(repository, "files", f"the card of {folder} has figures or was edited, "
                       "which would be lost; save the model with its members linked: "
                       "zoo.save(model, out, evaluations=…, link_members=True), edit the card "
                       "there, then push that folder")


def uploads(folder: Path, repository: str, licence: str | None) -> list[Upload]:
    """The files of a saved model, by name.

    Raises FormatError for what is no model or damaged, HubError for a file that has no business
    on the Hub or a licence that cannot be told.
    """
    config = read_config(folder)
    _want_only_a_model(folder, repository)
    open_tensors(folder)  # the headers, so that nothing damaged goes up
    links_in(folder)
    card = folder / CARD
    if not card.is_file():
        raise HubError(repository, "files", f"{folder} has no {CARD}, the page that people see; "
                       "zoo.save writes one")
    text = published(card.read_text("utf-8"), repository, _licence(repository, config, licence))
    found = [_upload(file, text.encode() if file.name == CARD else None)
             for file in sorted(folder.iterdir()) if not is_ignored(file.name)]
    recorded = recorded_hashes(folder)
    for each in found:
        if recorded.get(each.name, each.sha256) != each.sha256:
            raise HubError(repository, "files", f"{each.name} in {folder} has changed since the "
                           "model was saved, and nobody could load it: config.json records sha256 "
                           f"{recorded[each.name][:12]}…, the file has {each.sha256[:12]}…. If "
                           "that is meant, save it again: zoo.save(zoo.load(folder), out)")
    return found


def _upload(file: Path, content: bytes | None) -> Upload:
    if content is None:
        return Upload(file.name, file.stat().st_size, sha256_of(file), file)
    return Upload(file.name, len(content), hashlib.sha256(content).hexdigest(), content)


def _want_only_a_model(folder: Path, repository: str) -> None:
    files = [file for file in sorted(folder.iterdir()) if not is_ignored(file.name)]
    pickles = [file.name for file in files if file.suffix in PICKLES]
    if pickles:
        raise HubError(repository, "files", f"{', '.join(pickles)} in {folder} is a pickle, which "
                       "can run any program on the machine that reads it, and is never pushed; "
                       "move it elsewhere; `zoo convert` writes its tensors as safetensors")
    links = [file.name for file in files if leads_outside(file)]
    if links:
        raise HubError(repository, "files", f"{', '.join(links)} in {folder} is a link to "
                       "something outside of it; put the file itself there if it is meant to "
                       "be published")
    strays = [file.name for file in files if not (is_published(file.name) and file.is_file())]
    if strays:
        raise HubError(repository, "files", f"{', '.join(strays)} in {folder} belongs to no model; "
                       "only weights (.safetensors), config.json, README.md, licences and the "
                       "card's pictures are pushed. Move it elsewhere")


def _licence(repository: str, config: Mapping[str, Any], given: str | None) -> str | None:
    """The licence for the card. given: the user's word, which goes before what zoo can tell."""
    if given is not None:
        return given.lower()
    described = config.get("zoo")
    found, problem = terms(described.get("made_with") if isinstance(described, dict) else None)
    if problem:
        raise HubError(repository, "licence", f"{problem}. Look at what its members allow, then "
                       "say under which licence it is published: license='…' "
                       "(`zoo push --license …`)")
    return found
