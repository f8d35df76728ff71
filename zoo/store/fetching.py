"""A Hub repository on this machine, at one commit, complete and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml

from zoo.downloads import forget_store, guard_client
from zoo.errors import FormatError, WeightsError
from zoo.names import Address
from zoo.progress import task
from zoo.store.answers import patiently, refusal
from zoo.store.arriving import Arrived, hashed_on_arrival
from zoo.store.contents import CARD, CONFIG, FETCHED, NOT_FETCHED, ORIGIN
from zoo.store.hashes import git_oid, sha256_of
from zoo.tensors.reading import PICKLES

# A repository's folder on this machine, and which repository and commit that is.
Fetched: TypeAlias = tuple[Path, dict[str, str]]
T = TypeVar("T")
_AT_ONCE = 8  # repositories; the client fetches several files of each


def hub_folders(addresses: Iterable[Address]) -> dict[Address, Fetched]:
    """The folders of several repositories, fetched side by side; one that is named twice, once.

    Raises WeightsError of the first that cannot be had, as `hub_folder` does.
    """
    return side_by_side({address: partial(hub_folder, address)
                         for address in dict.fromkeys(addresses)})


def side_by_side(calls: Mapping[Address, Callable[..., T]]) -> dict[Address, T]:
    """What each of these calls gives that fetch a repository; several at a time, with `quiet`."""
    if len(calls) < 2:
        return {address: call() for address, call in calls.items()}
    with (ThreadPoolExecutor(_AT_ONCE, "zoo-fetch") as pool,
          task("fetch from the Hub", len(calls), "repositories") as advance):
        at_work = {pool.submit(call, quiet=True): address for address, call in calls.items()}
        done = {}
        try:
            for future in as_completed(at_work):
                done[at_work[future]] = future.result()
                advance()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return done


def hub_folder(
    address: Address, *, quiet: bool = False, only: Mapping[str, str] | None = None,
    most: int | None = None,
) -> Fetched:
    """The folder of a repository, and which repository and commit that is.

    Fetched where it is not in the cache, pickles never. Every file is compared with what the Hub
    says of the commit, and the weights with what they were when the model was saved.
    quiet: without the client's own progress bars. only: fetch no other files than these; of each
    the sha256 that it must have, `""` where it may be missing and have any. most: bytes that
    these may have, as the Hub tells before they are fetched; what is in the cache is not asked for.
    Raises WeightsError when it cannot be had, is not complete, or has changed, FormatError when it
    has no weights that zoo reads.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils.tqdm import tqdm

    class Hidden(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    failed = None
    guard_client()
    try:
        kept = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=address.location,
                                                               repo_type="model") / "blobs"
        if only and most is not None:
            _want_small(address, only, most)
        with hashed_on_arrival(kept) as arrived:
            folder = Path(patiently(lambda: snapshot_download(
                address.location, revision=address.revision, allow_patterns=list(only or FETCHED),
                ignore_patterns=list(NOT_FETCHED), tqdm_class=Hidden if quiet else None)))
    except Exception as error:
        failed = _why(error)
        forget_store()
    if failed:  # raised out here: what the client raised may hold the token
        raise WeightsError(f"{address} cannot be had: {failed}")
    for name, hash_ in (only or {}).items():
        if hash_ and not (folder / name).is_file():
            raise WeightsError(f"{address} has no {name} any more; ask its owner")
    if not only and not any(folder.glob("*.safetensors")):
        raise _without_weights(address, folder.name)
    if not folder.is_dir():
        raise WeightsError(f"{address} has none of {', '.join(only or ())}")
    _want_whole(address, folder)
    known = _want_unchanged(address, folder, arrived)
    for name, hash_ in (only or {}).items():
        found = known.get(name) or (sha256_of(folder / name) if hash_ else "")
        if hash_ and found != hash_:
            raise WeightsError(
                f"{name} in {address} is not what it was when the model was saved: expected "
                f"sha256 {hash_[:12]}…, found {found[:12]}…. Ask the owner of either to save and "
                "push it again")
    origin = {"repository": address.location, "revision": folder.name}
    licence = _licence(folder)
    return folder, origin | ({"license": licence} if licence else {})


def origin_of(folder: Path) -> dict[str, str]:
    """Which repository and commit a pulled folder is; {} of any other."""
    try:
        told = json.loads((folder / ORIGIN).read_text("utf-8"))
        return {key: str(told[key]) for key in ("repository", "revision", "license") if key in told}
    except (OSError, ValueError, TypeError):
        return {}


def _why(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, WeightsError):
        return str(error)
    told = refusal(error)
    incomplete = getattr(errors, "IncompleteSnapshotError", None)
    if incomplete and isinstance(error, incomplete):
        return ("it is in the cache in part only, and the Hub cannot be reached; load it once "
                "while online")
    if told.reason == "offline" or (told.reason == "other"
                                    and isinstance(error, errors.LocalEntryNotFoundError)):
        return "the Hub cannot be reached and it is not in the cache; load it once while online"
    return told.sentence


def _without_weights(address: Address, commit: str) -> FormatError | WeightsError:
    """What to say of a repository that has no weights which zoo reads: what it has."""
    from huggingface_hub import HfApi

    try:
        names = patiently(lambda: HfApi().list_repo_files(address.location, revision=commit))
    except Exception:  # what it has is not known then
        return WeightsError(f"{address} has no safetensors, as far as the cache knows; load it "
                            "once while online")
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        return FormatError(str(address), f"has its weights as pickles only ({_few(pickles)}), "
                           "which can run any program on the machine that reads them and are never "
                           "fetched; ask its owner for safetensors, or download one yourself: "
                           "`zoo convert` writes its tensors")
    there = _few([name for name in names if name != ".gitattributes"]) or "nothing"
    return FormatError(str(address), "is no model that zoo reads: it has no safetensors beside its "
                       f"page, but {there}")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")


def _want_small(address: Address, only: Iterable[str], most: int) -> None:
    """Whether these files have no more bytes than that. Asks the Hub, unless it is offline or all
    are in the cache."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or all(
            isinstance(try_to_load_from_cache(address.location, name, revision=address.revision),
                       str) for name in only):
        return
    told = patiently(lambda: HfApi().model_info(address.location, revision=address.revision,
                                                files_metadata=True))
    wanted = set(only)
    size = sum(each.size or 0 for each in told.siblings or () if each.rfilename in wanted)
    if size > most:
        raise WeightsError(f"its files of weights have {size:,} bytes, and the model has room for "
                           f"no more than {most:,}; ask the owner of the model to save it again")


def _want_whole(address: Address, folder: Path) -> None:
    """Whether the shards that the index names are all there. Older clients take what the cache has
    for the whole when they are offline."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the loader says what is wrong with it
        for name in sorted(str(each) for each in named):
            if "/" not in name and not (folder / name).is_file():
                raise WeightsError(f"{address} cannot be had: {name} is missing, in the cache or "
                                   "in the repository; load it again while online, or ask its "
                                   "owner")


def _want_unchanged(address: Address, folder: Path, arrived: Arrived) -> Mapping[str, str]:
    """The sha256 of what it has looked at, by file name."""
    known: dict[str, str] = {}  # sha256 of what was just compared, so that it is not read again
    for file in sorted(folder.iterdir()):
        if not file.is_symlink():
            continue  # a copy, where the file system has no links, and nothing says of what
        # The cache keeps a copy under the hash that the Hub told: the sha256 of a large file,
        # git's of another. That may be a link itself, to what several repositories have.
        kept = folder / file.readlink()
        large = re.fullmatch(r"[0-9a-f]{64}", kept.name)
        if not large and not re.fullmatch(r"[0-9a-f]{40}", kept.name):
            continue
        if large and arrived.sha256_of(kept) == kept.name:
            found = kept.name
        else:
            found = sha256_of(kept) if large else git_oid(kept.read_bytes())
        if large:
            known[file.name] = found
        if kept.name != found:
            kept.resolve().unlink(missing_ok=True)
            for link in (file, kept):
                link.unlink(missing_ok=True)
            raise WeightsError(
                f"{address}: {file.name} is not what the Hub has at commit {folder.name}: it was "
                "damaged on the way or on this disk. The copy is deleted; run the same again to "
                "fetch it anew")
    for name, hash_ in recorded_hashes(folder).items():
        file = folder / name
        if "/" in name or not file.is_file():
            continue
        found = known.get(name) or sha256_of(file)
        if found != hash_:
            raise WeightsError(
                f"{address}: {name} has changed since the model was saved: config.json records "
                f"sha256 {hash_[:12]}…, the file has {found[:12]}…. Load an earlier "
                "revision, or ask the owner to save and push it again")
    return known


def recorded_hashes(folder: Path) -> Mapping[str, str]:
    """File name → sha256, as the model's provenance has them."""
    try:
        told: Any = json.loads((folder / CONFIG).read_text("utf-8"))
        found = told["zoo"]["made_with"]["sha256"]
        return {str(name): str(hash_) for name, hash_ in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _licence(folder: Path) -> str:
    """The licence that the repository's card states."""
    try:
        match = re.match(r"---\r?\n(.*?)\n---", (folder / CARD).read_text("utf-8"), re.DOTALL)
        told = yaml.safe_load(match[1]).get("license") if match else None
    except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError):
        return ""
    return told if isinstance(told, str) else ""
