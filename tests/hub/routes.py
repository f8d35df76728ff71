"""The calls of both origins: one function each, and the tables that lead to them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

import yaml

from hub.repositories import LARGE as LARGE_NAMES
from hub.repositories import Blob, Caller, Commit, PullRequest, Refused, Repository, Store

if TYPE_CHECKING:
    from hub.server import Hub

WHEN = "2026-01-01T00:00:00.000Z"
# The real Hub's list is longer; a name that is not on it is refused there too.
LICENCES = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0",
            "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0", "openrail",
            "unlicense", "isc", "other", "unknown"}


@dataclass
class Answer:
    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    hub: Hub
    caller: Caller
    method: str
    body: bytes
    headers: Mapping[str, str]
    query: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def repository(self, name: str, *, contents: bool = False) -> Repository:
        found = self.hub.store.repository(name, self.caller)
        found.want_read(self.caller, contents=contents)
        return found


def create(request: Request) -> Answer:
    told = request.json
    name = f"{told.get('organization') or request.caller.name}/{told['name']}"
    answer = {"url": f"{request.hub.url}/{name}", "id": name}
    if told.get("type") == "space":
        name = f"spaces/{name}"
        answer["url"] = f"{request.hub.url}/{name}"
    try:
        request.hub.store.create(name, request.caller, told.get("visibility") == "private")
    except Refused as refused:
        if refused.status != 409:
            raise
        return Answer(409, {**answer, "error": refused.message})
    return Answer(200, answer)


def delete(request: Request) -> Answer:
    told = request.json
    name = f"{told.get('organization') or request.caller.name}/{told['name']}"
    request.repository(name).want_write(request.caller)
    del request.hub.store.repositories[name]
    return Answer(200, {})


def whoami(request: Request) -> Answer:
    caller = request.caller
    if not caller.name:
        raise Refused(401, "Invalid username or password.")
    return Answer(200, {
        "type": "user", "id": caller.name, "name": caller.name, "fullname": caller.name,
        "orgs": [{"name": name, "roleInOrg": caller.role} for name in
                 sorted(caller.organisations)],
        "auth": {"type": "access_token",
                 "accessToken": {"displayName": "test", "role": caller.role}},
    })


def validate_yaml(request: Request) -> Answer:
    match = re.match(r"---\n(.*?)\n---", request.json["content"], re.DOTALL)
    if not match:
        return Answer(200, {"errors": [],
                            "warnings": [{"message": "empty or missing yaml metadata"}]})
    problems = []
    try:
        told = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        problems, told = [f"Invalid YAML: {error}"], {}
    if told.get("license", "mit") not in LICENCES:
        problems.append(f'"license" must be one of {sorted(LICENCES)}')
    if not isinstance(told.get("tags", []), list):
        problems.append('"tags" must be an array')
    return Answer(400 if problems else 200,
                  {"errors": [{"message": each} for each in problems], "warnings": []})


def info(request: Request, name: str, revision: str = "main") -> Answer:
    repository = request.repository(name)
    commit = repository.commit_of(revision)
    siblings = [{"rfilename": path, **({
        "size": blob.size, "blobId": blob.oid,
        **({"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}}
           if blob.sha256 else {})} if request.query.get("blobs") else {})}
        for path, blob in sorted(commit.files.items())]
    return Answer(200, {
        "_id": name, "id": name, "modelId": name, "author": repository.namespace,
        "sha": commit.oid, "private": repository.private,
        "gated": "manual" if repository.gated else False, "disabled": False, "tags": [],
        "downloads": 0, "likes": 0, "createdAt": WHEN, "lastModified": WHEN,
        "siblings": siblings})


def tree(request: Request, name: str, revision: str, folder: str | None = None) -> Answer:
    commit = request.repository(name).commit_of(revision)
    prefix = f"{folder}/" if folder else ""
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    found: dict[str, dict[str, object]] = {}
    for path, blob in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        first, slash, _ = path[len(prefix):].partition("/")
        if slash:
            found.setdefault(prefix + first, {
                "type": "directory", "path": prefix + first, "size": 0, "oid": commit.oid})
        if recursive or not slash:
            found[path] = blob.described(path)
    if prefix and not found:
        raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    entries = list(found.values())
    start = int(request.query.get("cursor", 0))
    stop = start + request.hub.store.page
    headers = {"X-Repo-Commit": commit.oid}
    if stop < len(entries):
        rest = "&".join(f"{key}={value}" for key, value in
                        {**request.query, "cursor": stop}.items())
        tail = f"/{quote(folder, safe='')}" if folder else ""
        headers["Link"] = (f"<{request.hub.url}/api/models/{name}/tree/"
                           f'{quote(revision, safe="")}{tail}?{rest}>; rel="next"')
    return Answer(200, entries[start:stop], headers)


def paths_info(request: Request, name: str, revision: str) -> Answer:
    commit = request.repository(name).commit_of(revision)
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return Answer(200, [commit.files[path].described(path) for path in wanted
                        if path in commit.files])


def preupload(request: Request, name: str, revision: str) -> Answer:
    repository = request.repository(name, contents=True)
    if not request.query.get("create_pr"):
        repository.want_write(request.caller)
    there = repository.commit_of(revision).files
    told = []
    for file in request.json["files"]:
        path = file["path"]
        large = path.endswith(LARGE_NAMES) or file["size"] > 10 << 20
        told.append({"path": path, "uploadMode": "lfs" if large else "regular",
                     "shouldIgnore": False,
                     "oid": there[path].etag if path in there else None})
    return Answer(200, {"files": told})


def commit(request: Request, name: str, revision: str) -> Answer:
    store = request.hub.store
    repository = request.repository(name)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    opens = bool(request.query.get("create_pr"))
    if not request.caller.name:
        raise Refused(401, "Invalid username or password.")
    if not opens:
        repository.want_write(request.caller)
    with store.lock:
        parent = repository.commit_of(revision)
        if header.get("parentCommit") not in (None, parent.oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = changed(store, parent, lines)
        ref, url = f"refs/heads/{revision}", None
        if opens:
            num = opened(repository, header["summary"], request.caller.name)
            ref, url = f"refs/pr/{num}", f"{request.hub.url}/{name}/discussions/{num}"
        elif revision in repository.refs:
            ref = revision
        made = store.commit(repository, ref, parent, files, header["summary"])
    return Answer(200, {"success": True, "commitOid": made.oid, "hookOutput": "",
                        "commitUrl": f"{request.hub.url}/{name}/commit/{made.oid}",
                        "pullRequestUrl": url})


def changed(store: Store, parent: Commit, lines: list[dict[str, Any]]) -> dict[str, Blob]:
    files = dict(parent.files)
    for line in lines:
        told = line["value"]
        if line["key"] == "file":
            files[told["path"]] = Blob.regular(base64.b64decode(told["content"]))
        elif line["key"] == "lfsFile":
            known = store.known(told["oid"])
            if known is None:
                raise Refused(400, f"LFS pointer of {told['path']} points to no file")
            files[told["path"]] = known
        elif line["key"] in ("deletedFile", "deletedFolder"):
            gone = [path for path in files
                    if path == told["path"] or path.startswith(told["path"].rstrip("/") + "/")]
            if not gone:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            for path in gone:
                del files[path]
    return files


def opened(repository: Repository, title: str, author: str) -> int:
    num = len(repository.pulls) + 1
    repository.pulls.append(PullRequest(num, title, author))
    repository.refs[f"refs/pr/{num}"] = repository.refs["refs/heads/main"]
    return num


def discuss(request: Request, name: str) -> Answer:
    repository = request.repository(name)
    if not request.caller.name:
        raise Refused(401, "Invalid username or password.")
    return Answer(200, {"num": opened(repository, request.json["title"], request.caller.name)})


def discussion(request: Request, name: str, num: str) -> Answer:
    repository = request.repository(name)
    if int(num) > len(repository.pulls):
        raise Refused(404, "Discussion not found")
    pull = repository.pulls[int(num) - 1]
    return Answer(200, {
        "title": pull.title, "num": pull.num, "author": {"name": pull.author}, "createdAt": WHEN,
        "status": pull.status, "repo": {"name": name, "type": "model"}, "isPullRequest": True,
        "events": [], "filesWithConflicts": [], "changes": {"base": "refs/heads/main"}})


def merge(request: Request, name: str, num: str) -> Answer:
    repository = request.repository(name)
    repository.want_write(request.caller)
    repository.refs["refs/heads/main"] = repository.refs[f"refs/pr/{num}"]
    repository.pulls[int(num) - 1].status = "merged"
    return Answer(200, {})


def branch(request: Request, name: str, branch: str) -> Answer:
    repository = request.repository(name)
    repository.want_write(request.caller)
    ref = f"refs/heads/{branch}"
    if request.method == "DELETE":
        repository.refs.pop(ref)
        return Answer(200, {})
    if ref in repository.refs:
        raise Refused(409, "Reference already exists")
    repository.refs[ref] = repository.commit_of(request.json.get("startingPoint") or "main").oid
    return Answer(200, {})


def tag(request: Request, name: str, revision: str) -> Answer:
    repository = request.repository(name)
    repository.want_write(request.caller)
    ref = f"refs/tags/{request.json['tag']}"
    if ref in repository.refs:
        raise Refused(409, "Reference already exists")
    repository.refs[ref] = repository.commit_of(revision).oid
    return Answer(200, {})


def refs(request: Request, name: str) -> Answer:
    told = request.repository(name).refs

    def of(kind: str) -> list[dict[str, str]]:
        return [{"name": ref.removeprefix(f"refs/{kind}/"), "ref": ref, "targetCommit": oid}
                for ref, oid in told.items() if ref.startswith(f"refs/{kind}/")]

    return Answer(200, {"branches": of("heads"), "tags": of("tags"), "converts": [],
                        "pullRequests": of("pr")})


def lfs_batch(request: Request, name: str) -> Answer:
    hub = request.hub
    # A pull request may be opened by anybody who can read; the client then names no ref.
    if request.json.get("ref"):
        request.repository(name).want_write(request.caller)
    elif not request.repository(name) or not request.caller.name:
        raise Refused(401, "Invalid username or password.")
    told = []
    for each in request.json["objects"]:
        oid, size = each["oid"], each["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in hub.store.large:
            upload: dict[str, Any] = {"href": f"{hub.large_url}/upload/{oid}?key={hub.key}"}
            if size > hub.store.part and "multipart" in request.json["transfers"]:
                count = -(-size // hub.store.part)
                upload = {"href": f"{hub.url}/complete/{oid}?key={hub.key}", "header": {
                    "chunk_size": str(hub.store.part),
                    **{str(n): f"{hub.large_url}/part/{oid}/{n}?key={hub.key}"
                       for n in range(1, count + 1)}}}
            answer["actions"] = {"upload": upload, "verify": {
                "href": f"{hub.url}/{name}.git/info/lfs/objects/verify"}}
        told.append(answer)
    return Answer(200, {"transfer": "basic", "objects": told})


def lfs_verify(request: Request, name: str) -> Answer:
    told = request.json
    if len(request.hub.store.large.get(told["oid"], b"")) != told["size"]:
        raise Refused(404, "The object was not uploaded")
    return Answer(200, {})


def complete(request: Request, oid: str) -> Answer:
    want_signed(request)
    if oid in request.hub.store.large:  # the first answer was lost
        return Answer(200, {})
    parts = request.hub.store.parts.pop(oid, {})
    numbers = [part["partNumber"] for part in request.json["parts"]]
    request.hub.store.put(oid, b"".join(parts.get(number, b"") for number in numbers))
    return Answer(200, {})


def xet_token(request: Request, name: str, right: str, revision: str) -> Answer:
    repository = request.repository(name, contents=True)
    if request.hub.store.xet is None:
        raise Refused(404, "This Hub has no Xet")
    if right == "write" and not request.query.get("create_pr"):
        repository.want_write(request.caller)
    told = {"casUrl": request.hub.store.elsewhere or f"local://{request.hub.store.xet}",
            "exp": 1 << 40, "accessToken": "xet"}
    return Answer(200, told, {"X-Xet-Cas-Url": told["casUrl"], "X-Xet-Access-Token": "xet",
                              "X-Xet-Token-Expiration": str(told["exp"])})


def xet_store(request: Request, _: str) -> Answer:
    """A Xet store on the network, for the faults that it may have. It has nothing."""
    raise Refused(404, "Not found")


def resolve(request: Request, name: str, revision: str, path: str) -> Answer:
    repository = request.repository(name, contents=True)
    commit = repository.commit_of(revision)
    if path not in commit.files:
        raise Refused(404, "Entry not found", "EntryNotFound")
    blob = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
    if blob.xet:
        headers |= {"X-Xet-Hash": blob.xet, "X-Xet-Refresh-Route":
                    f"{request.hub.url}/api/models/{name}/xet-read-token/{commit.oid}"}
    if blob.sha256:
        return Answer(302, b"", {
            **headers, "X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size),
            "Location": f"{request.hub.large_url}/blob/{blob.sha256}?key={request.hub.key}"})
    return ranged(request, blob.data, headers)


def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not match:
        return Answer(200, data, {**headers, "Accept-Ranges": "bytes"})
    start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
    if start >= len(data):
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    span = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
    return Answer(206, data[start:stop], {**headers, "Content-Range": span})


def want_signed(request: Request) -> None:
    if request.query.get("key") != request.hub.key:
        raise Refused(403, "The address is not signed")


def blob(request: Request, oid: str) -> Answer:
    want_signed(request)
    return ranged(request, request.hub.store.large[oid], {"ETag": f'"{oid}"'})


def upload(request: Request, oid: str) -> Answer:
    want_signed(request)
    request.hub.store.put(oid, request.body)
    return Answer(200, b"", {"ETag": f'"{oid}"'})


def part(request: Request, oid: str, number: str) -> Answer:
    want_signed(request)
    with request.hub.store.lock:
        request.hub.store.parts.setdefault(oid, {})[int(number)] = request.body
    return Answer(200, b"", {"ETag": f'"{oid}-{number}"'})


_ID = r"((?:spaces/)?[\w.-]+/[\w.-]+?)"  # a Space's repository has `spaces/` before its name
_MODEL = f"/api/models/{_ID}"
_ONE = r"([^/]+)"
Routes = list[tuple[str, str, str, Callable[..., Answer]]]
API: Routes = [
    ("POST", "/api/repos/create", "create", create),
    ("DELETE", "/api/repos/delete", "delete", delete),
    ("GET", "/api/whoami-v2", "whoami", whoami),
    ("POST", "/api/validate-yaml", "validate-yaml", validate_yaml),
    ("GET", _MODEL, "info", info),
    ("GET", f"{_MODEL}/revision/{_ONE}", "info", info),
    ("GET", f"{_MODEL}/tree/{_ONE}(?:/{_ONE}?)?", "tree", tree),
    ("POST", f"{_MODEL}/paths-info/{_ONE}", "paths-info", paths_info),
    ("POST", f"{_MODEL}/preupload/{_ONE}", "preupload", preupload),
    ("POST", f"{_MODEL}/commit/{_ONE}", "commit", commit),
    ("POST", f"{_MODEL}/discussions", "discussion", discuss),
    ("GET", f"{_MODEL}/discussions/(\\d+)", "discussion", discussion),
    ("POST", f"{_MODEL}/discussions/(\\d+)/merge", "discussion", merge),
    ("POST|DELETE", f"{_MODEL}/branch/{_ONE}", "branch", branch),
    ("POST", f"{_MODEL}/tag/{_ONE}", "tag", tag),
    ("GET", f"{_MODEL}/refs", "refs", refs),
    ("GET", f"{_MODEL}/xet-(read|write)-token/{_ONE}", "xet-token", xet_token),
    ("GET|POST|PUT", "/xet/(.+)", "xet-store", xet_store),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "lfs-batch", lfs_batch),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/verify", "lfs-verify", lfs_verify),
    ("POST", f"/complete/{_ONE}", "lfs-complete", complete),
    ("GET", f"/{_ID}/resolve/{_ONE}/(.+)", "resolve", resolve),
]
LARGE: Routes = [
    ("GET", f"/blob/{_ONE}", "blob", blob),
    ("PUT", f"/upload/{_ONE}", "upload", upload),
    ("PUT", f"/part/{_ONE}/(\\d+)", "part", part),
]
