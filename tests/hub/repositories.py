"""What the Hub knows: accounts, repositories, commits, refs, pull requests, large files."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hub.xet import files_in

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGE = (".safetensors", ".bin", ".pt", ".png", ".jpg")


class Refused(Exception):
    """The Hub says no: a status, and what stands in X-Error-Code and X-Error-Message."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


@dataclass(frozen=True)
class Blob:
    """One file of a commit. data: the bytes of a regular file, the store has those of a large one.
    oid: as git counts it. xet: its hash there."""

    size: int
    oid: str
    sha256: str | None = None
    data: bytes = b""
    xet: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> Blob:
        return cls(len(data), git_oid(data), None, data)

    @classmethod
    def large(cls, sha256: str, size: int, xet: str | None = None) -> Blob:
        return cls(size, git_oid(pointer(sha256, size)), sha256, xet=xet)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def described(self, path: str) -> dict[str, object]:
        told: dict[str, object] = {
            "type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            told["lfs"] = {"oid": self.sha256, "size": self.size,
                           "pointerSize": len(pointer(self.sha256, self.size))}
        if self.xet:
            told["xetHash"] = self.xet
        return told


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    files: Mapping[str, Blob]
    title: str


@dataclass
class PullRequest:
    num: int
    title: str
    author: str
    status: str = "open"


@dataclass(frozen=True)
class Caller:
    """Who asks. role: of the token, `"read"` or `"write"`; name is "" without one."""

    name: str = ""
    role: str = ""
    organisations: frozenset[str] = frozenset()

    def may_write_in(self, namespace: str) -> bool:
        return self.role == "write" and namespace in {self.name, *self.organisations}


@dataclass
class Repository:
    id: str
    private: bool = False
    gated: bool = False
    allowed: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[PullRequest] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.id.removeprefix("spaces/").partition("/")[0]

    def commit_of(self, revision: str) -> Commit:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def want_read(self, caller: Caller, *, contents: bool = False) -> None:
        """contents: of the files; of a gated repository everybody sees the names."""
        inside = self.namespace in {caller.name, *caller.organisations}
        if self.private and not inside:
            raise missing(caller)
        if contents and self.gated and not inside and caller.name not in self.allowed:
            raise Refused(403 if caller.name else 401, "Access to this model is restricted",
                          "GatedRepo")

    def want_write(self, caller: Caller) -> None:
        self.want_read(caller)
        if not caller.may_write_in(self.namespace):
            raise Refused(403 if caller.name else 401,
                          f"You don't have the rights to write to {self.id}")


class Store:
    """Everything, behind one lock. page: entries of a listing. part: largest upload in one piece,
    in bytes. xet: the folder of a local Xet store, for clients that use it. elsewhere: another
    address that they are sent to instead. renamed: old name → new one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.callers: dict[str, Caller] = {}
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.page = 1000
        self.part = 5 << 20
        self.xet: Path | None = None
        self.elsewhere = ""
        self.renamed: dict[str, str] = {}
        self._count = itertools.count()

    def repository(self, name: str, caller: Caller) -> Repository:
        with self.lock:
            if name not in self.repositories:
                raise missing(caller)
            return self.repositories[name]

    def create(self, name: str, caller: Caller, private: bool) -> Repository:
        with self.lock:
            if not caller.name:
                raise Refused(401, "Invalid username or password.")
            made = Repository(name, private)
            if not caller.may_write_in(made.namespace):
                raise Refused(403, "You don't have the rights to create a model under the "
                              f'namespace "{made.namespace}"')
            if name in self.repositories:
                raise Refused(409, "You already created this model repo")
            self.repositories[name] = made
            self.commit(made, "refs/heads/main", None,
                        {".gitattributes": Blob.regular(ATTRIBUTES)}, "initial commit")
            return made

    def commit(self, repository: Repository, ref: str, parent: Commit | None,
               files: Mapping[str, Blob], title: str) -> Commit:
        for path in files:
            if not path or path.startswith("/") or {"..", ".", ".git", ""} & set(path.split("/")):
                raise Refused(400, f"Invalid path: {path}")
        text = f"{parent and parent.oid} {sorted(files)} {title} {next(self._count)}"
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), parent and parent.oid,
                      dict(files), title)
        with self.lock:
            repository.commits[made.oid] = made
            repository.refs[ref] = made.oid
        return made

    def put(self, sha256: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Refused(400, "The bytes do not have the hash that was announced")
        with self.lock:
            self.large[sha256] = data

    def seed(self, name: str, folder: Path, *, private: bool = False, gated: bool = False) -> str:
        """A repository with the files of a folder, as if it had been pushed; its commit."""
        repository = Repository(name, private, gated)
        files = {".gitattributes": Blob.regular(ATTRIBUTES)}
        for file in sorted(folder.iterdir()):
            data = file.read_bytes()
            if file.name.endswith(LARGE):
                sha256 = hashlib.sha256(data).hexdigest()
                self.put(sha256, data)
                files[file.name] = Blob.large(sha256, len(data))
            else:
                files[file.name] = Blob.regular(data)
        self.repositories[name] = repository
        return self.commit(repository, "refs/heads/main", None, files, "seed").oid

    def known(self, sha256: str) -> Blob | None:
        """A large file that was uploaded, one way or the other."""
        if sha256 in self.large:
            return Blob.large(sha256, len(self.large[sha256]))
        found = files_in(self.xet).get(sha256) if self.xet else None
        return Blob.large(sha256, found.size, found.hash) if found else None


def missing(caller: Caller) -> Refused:
    return Refused(404 if caller.name else 401, "Repository not found", "RepoNotFound")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return (f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n"
            f"size {size}\n").encode()
