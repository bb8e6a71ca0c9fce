"""The answers, one function an address of the Hub. Their names are those that `LocalHub.fail` takes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs

import yaml

from .repositories import LFS_SIZE, LFS_SUFFIXES, File, Repository
from .server import Handler, Refusal, address, route


DATE = "2026-01-01T00:00:00.000Z"
API = "/api/(models|datasets)/([^/]+/[^/]+)"
PAGE = "/(datasets/)?([^/]+/[^/]+)"
STORAGE = f"/storage{PAGE}/([0-9a-f]{{64}})"


@route("GET", "/api/whoami-v2")
def whoami(request: Handler) -> dict:
    user = request.writer()
    token = {"displayName": "test", "role": "write", "createdAt": DATE}
    auth = {"type": "access_token", "accessToken": token}
    return {"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth}


@route("POST", "/api/repos/create")
def create(request: Handler) -> dict:
    asked = json.loads(request.body)
    name = f"{request.writer(asked.get('organization'))}/{asked['name']}"
    key = address(asked.get("type"), name)
    about = {"url": f"{request.hub.url}/{key}", "name": name, "id": name}
    if key in request.hub.repositories:
        raise Refusal(409, "You already created this repository", **about)
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    request.hub.repositories[key] = Repository(name, private)
    return about


@route("DELETE", "/api/repos/delete")
def delete(request: Handler) -> dict:
    asked = json.loads(request.body)
    name = f"{asked.get('organization') or request.writer()}/{asked['name']}"
    request.repository(asked.get("type"), name, write=True)
    del request.hub.repositories[address(asked.get("type"), name)]
    return {}


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Handler) -> dict:
    try:
        card_data(json.loads(request.body)["content"])
    except yaml.YAMLError as error:
        raise Refusal(400, "Invalid metadata in README.md", errors=[{"message": str(error)}], warnings=[]) from error
    return {"errors": [], "warnings": []}


@route("POST", f"{API}/preupload/([^/]+)")
def preupload(request: Handler, kind: str, name: str, revision: str) -> dict:
    _, commit = request.commit(kind, name, revision, write=True)
    files = []
    for asked in json.loads(request.body)["files"]:
        present = commit.files.get(asked["path"])
        is_lfs = asked["path"].endswith(LFS_SUFFIXES) or asked["size"] > LFS_SIZE
        about = {"uploadMode": "lfs" if is_lfs else "regular", "oid": present.oid if present else None}
        files.append({"path": asked["path"], "shouldIgnore": False} | about)
    return {"files": files}


@route("POST", rf"{PAGE}\.git/info/lfs/objects/batch")
def batch(request: Handler, kind: str, name: str) -> dict:
    repository = request.repository(kind, name, write=True)
    target = f"{request.hub.url}/storage/{address(kind, name)}"
    objects = []
    for asked in json.loads(request.body)["objects"]:
        oid, size = asked["oid"], asked["size"]
        actions = {
            "upload": {"href": f"{target}/{oid}?size={size}"},
            "verify": {"href": f"{target}/{oid}/verify"},
        }
        objects.append({"oid": oid, "size": size} | ({} if oid in repository.objects else {"actions": actions}))
    return {"transfer": "basic", "objects": objects}


@route("PUT", STORAGE)
def upload(request: Handler, kind: str, name: str, oid: str) -> dict:
    # Comes without a token: the Hub hands out addresses that are signed.
    if str(len(request.body)) != request.query["size"] or hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "The content has another size or SHA-256 than was announced")
    request.hub.repositories[address(kind, name)].objects[oid] = request.body
    return {}


@route("POST", f"{STORAGE}/verify")
def verify(request: Handler, kind: str, name: str, oid: str) -> dict:
    repository = request.repository(kind, name, write=True)
    if len(repository.objects.get(oid, b"")) != json.loads(request.body)["size"]:
        raise Refusal(404, "There is no such object")
    return {}


@route("POST", f"{API}/commit/([^/]+)")
def commit(request: Handler, kind: str, name: str, branch: str) -> dict:
    repository, head = request.commit(kind, name, branch, write=True)
    if branch not in repository.branches:
        raise Refusal(400, f"{branch} is no branch")
    # Into a copy, which takes its place only when all of it has been found right.
    files, header = dict(head.files), {}
    for line in request.body.splitlines():
        key, value = (item := json.loads(line))["key"], item["value"]
        path = value.get("path", "").rstrip("/")
        if key == "header":
            header = value
        elif key == "file":
            files[path] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repository.objects:
                raise Refusal(400, f"The content of {path} was not uploaded")
            files[path] = File(repository.objects[value["oid"]], is_lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or (key[7:] == "Folder" and name.startswith(f"{path}/"))]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            files = {name: file for name, file in files.items() if name not in gone}
        else:
            raise Refusal(400, f"Unknown operation {key}")
    if header.get("parentCommit") not in (None, head.oid):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    made = repository.commit(branch, header["summary"], files)
    url = f"{request.hub.url}/{address(kind, name)}/commit/{made.oid}"
    return {"success": True, "commitOid": made.oid, "commitUrl": url}


@route("GET", f"{API}(?:/revision/([^/]+))?")
def info(request: Handler, kind: str, name: str, revision: str) -> dict:
    repository, commit = request.commit(kind, name, revision or "main")
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    if "blobs" in request.query:
        for sibling in siblings:
            entry = commit.files[sibling["rfilename"]].entry("")
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if lfs := entry.get("lfs"):
                sibling["lfs"] = lfs | {"sha256": lfs["oid"]}
    card = card_data(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
    about = {"id": name, "author": name.split("/")[0], "sha": commit.oid, "private": repository.private}
    about |= {"lastModified": DATE, "createdAt": DATE, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
    about |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    return about | {"tags": card.get("tags", []), "cardData": card, "siblings": siblings}


@route("GET", f"{API}/tree/([^/]+)/?(.*)")
def tree(request: Handler, kind: str, name: str, revision: str, folder: str) -> list[dict]:
    entries = request.commit(kind, name, revision)[1].entries()
    if folder and folder not in entries:
        raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    prefix = f"{folder}/" if folder else ""
    below = {path: entry for path, entry in sorted(entries.items()) if path.startswith(prefix)}
    is_recursive = request.query.get("recursive", "").lower() == "true"
    return [entry for path, entry in below.items() if is_recursive or "/" not in path.removeprefix(prefix)]


@route("POST", f"{API}/paths-info/([^/]+)")
def paths_info(request: Handler, kind: str, name: str, revision: str) -> list[dict]:
    entries = request.commit(kind, name, revision)[1].entries()
    return [entries[path] for path in parse_qs(request.body.decode()).get("paths", []) if path in entries]


@route("GET", f"{API}/refs")
def refs(request: Handler, kind: str, name: str) -> dict:
    repository = request.repository(kind, name)
    branches, tags = (
        [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": oid} for ref, oid in oids.items()]
        for folder, oids in (("heads", repository.branches), ("tags", repository.tags))
    )
    return {"branches": branches, "tags": tags, "converts": []}


@route("POST", f"{API}/branch/([^/]+)")
def create_branch(request: Handler, kind: str, name: str, branch: str) -> dict:
    repository, commit = request.commit(kind, name, json.loads(request.body).get("startingPoint", "main"), write=True)
    return add_ref(repository.branches, branch, commit.oid)


@route("POST", f"{API}/tag/([^/]+)")
def create_tag(request: Handler, kind: str, name: str, revision: str) -> dict:
    repository, commit = request.commit(kind, name, revision, write=True)
    return add_ref(repository.tags, json.loads(request.body)["tag"], commit.oid)


@route("GET", f"{PAGE}/resolve/([^/]+)/(.+)")
def resolve(request: Handler, kind: str, name: str, revision: str, path: str) -> None:
    _, commit = request.commit(kind, name, revision)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    file = commit.files.get(path)
    if file is None:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        refusal.headers |= headers
        raise refusal
    data, status = file.data, 200
    headers["ETag"] = f'"{file.oid}"'
    if file.is_lfs:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": len(data)}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if wanted:
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first > last:
            raise Refusal(416, f"The file has {len(data)} bytes")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        data, status = data[first : last + 1], 206
    request.send(status, data, headers)


def add_ref(refs: dict[str, str], name: str, oid: str) -> dict:
    if name in refs:
        raise Refusal(409, f"Reference already exists: {name}")
    refs[name] = oid
    return {}


def card_data(text: str) -> dict:
    """What stands between the two lines of dashes that a model card opens with."""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}
