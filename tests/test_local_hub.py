"""The server that other tests take for the Hub is one to the real client, and fails as it is told to."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import _http


FILES = {
    "README.md": b"---\ntags: [test]\n---\n# A model\n",
    "model.safetensors": bytes(range(256)) * 40,
    "a/b.txt": b"b",
}


# Functions that run in the process of the client.


def push(repository: str, files: dict[str, bytes] = FILES, private: bool = False, **options) -> str:
    """Creates the repository where it is missing; returns the hash of the commit."""
    api, kind = HfApi(), options.get("repo_type")
    api.create_repo(repository, private=private, exist_ok=True, repo_type=kind)
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(repository, operations, commit_message="Push", **options).oid


def pull(repository: str, revision: str | None = None, **options) -> dict[str, bytes]:
    folder = Path(snapshot_download(repository, revision=revision, **options))
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".gitattributes"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def download(repository: str, path: str, **options) -> bytes:
    return Path(hf_hub_download(repository, path, **options)).read_bytes()


def call_api(method: str, *arguments, **options):
    return getattr(HfApi(), method)(*arguments, **options)


def error(function, *arguments, **options) -> tuple[str, int | None] | None:
    """Name of the error that a function raises, and the HTTP status behind it."""
    try:
        function(*arguments, **options)
    except Exception as raised:
        response = getattr(raised, "response", None) or getattr(raised.__cause__, "response", None)
        return type(raised).__name__, response and response.status_code


def do_not_wait() -> None:
    """Lets the client try again at once."""
    _http.http_backoff.__kwdefaults__["base_wait_time"] = 0


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with hub.client(tmp_path_factory.mktemp("home"), "hf_user") as client:
        client(do_not_wait)
        yield client


def test_what_is_pushed_comes_back_by_branch_tag_and_commit(hub, client):
    first = client(push, "user/versions")
    client(call_api, "create_tag", "user/versions", tag="v1")
    client(call_api, "create_branch", "user/versions", branch="trial/a")
    changed = {"README.md": b"# Changed\n", "model.safetensors": b"changed"}
    second = client(push, "user/versions", changed)
    third = client(push, "user/versions", {"a/b.txt": b"on a branch"}, revision="trial/a")
    assert client(pull, "user/versions") == client(pull, "user/versions", second) == FILES | changed
    assert client(pull, "user/versions", "v1") == client(pull, "user/versions", first) == FILES
    assert client(download, "user/versions", "a/b.txt", revision="trial/a") == b"on a branch"
    repository = hub.repositories["user/versions"]
    assert repository.branches == {"main": second, "trial/a": third}
    assert repository.tags == {"v1": first}
    refs = client(call_api, "list_repo_refs", "user/versions")
    assert {ref.name: ref.target_commit for ref in refs.branches + refs.tags} == repository.branches | {"v1": first}


def test_a_data_set_has_an_address_of_its_own(hub, client):
    client(push, "user/both", {"data.parquet": b"PAR1"}, repo_type="dataset")
    client(push, "user/both", {"config.json": b"{}"})
    assert client(pull, "user/both", repo_type="dataset") == {"data.parquet": b"PAR1"}
    assert client(pull, "user/both") == {"config.json": b"{}"}
    client(call_api, "delete_repo", "user/both")
    assert client(error, call_api, "model_info", "user/both") == ("RepositoryNotFoundError", 404)
    assert "user/both" not in hub.repositories
    assert "datasets/user/both" in hub.repositories


def test_what_has_not_changed_is_neither_uploaded_nor_committed_again(hub, client):
    first = client(push, "user/again")
    del hub.requests[:]
    assert client(push, "user/again") == first
    assert not {"upload", "commit"} & set(hub.requests)
    # The same content under another name: a commit, but no upload.
    assert client(push, "user/again", {"copy.safetensors": FILES["model.safetensors"]}) != first
    assert "upload" not in hub.requests


def test_the_client_finds_files_sizes_and_what_the_card_says(client):
    commit = client(push, "user/facts")
    info = client(call_api, "model_info", "user/facts", files_metadata=True)
    assert (info.sha, info.private, info.tags) == (commit, False, ["test"])
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes.items() >= {path: len(data) for path, data in FILES.items()}.items()
    entries = {entry.path: entry for entry in client(call_api, "get_paths_info", "user/facts", ["a", "no", "a/b.txt"])}
    assert set(entries) == {"a", "a/b.txt"}
    lfs = {sibling.rfilename: sibling.lfs for sibling in info.siblings}
    assert lfs["model.safetensors"].sha256 == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert lfs["README.md"] is None


def list_tree(repository: str, folder: str | None = None, recursive: bool = False) -> list[str]:
    return [entry.path for entry in HfApi().list_repo_tree(repository, folder, recursive=recursive)]


def test_folders_are_listed(client):
    client(push, "user/folders")
    top = [".gitattributes", "README.md", "a", "model.safetensors"]
    assert client(list_tree, "user/folders") == top
    assert client(list_tree, "user/folders", recursive=True) == [*top[:3], "a/b.txt", *top[3:]]
    assert client(list_tree, "user/folders", "a") == ["a/b.txt"]
    assert client(error, list_tree, "user/folders", "no") == ("RemoteEntryNotFoundError", 404)


def test_a_private_repository_is_there_for_its_owner_only(client):
    client(push, "user/secret", private=True)
    # No token at all, somebody else's, and one that nobody has. The owner comes last: the cache knows no owners.
    assert client(error, download, "user/secret", "README.md", token=False) == ("RepositoryNotFoundError", 401)
    assert client(error, download, "user/secret", "README.md", token="hf_other") == ("RepositoryNotFoundError", 404)
    assert client(error, call_api, "model_info", "user/secret", token="hf_other") == ("RepositoryNotFoundError", 404)
    assert client(error, call_api, "whoami", token="hf_nobody") == ("HfHubHTTPError", 401)
    assert client(pull, "user/secret") == FILES


def test_only_the_owner_writes(client):
    client(push, "user/open")
    assert client(download, "user/open", "README.md", token=False) == FILES["README.md"]
    operations = [CommitOperationDelete("README.md")]
    arguments = ("create_commit", "user/open", operations)
    assert client(error, call_api, *arguments, commit_message="No", token="hf_other") == ("HfHubHTTPError", 403)
    assert client(error, call_api, *arguments, commit_message="No", token=False) == ("HfHubHTTPError", 401)
    assert client(error, push, "other/name") == ("HfHubHTTPError", 403)


def test_what_is_missing_has_the_error_that_the_client_knows(client):
    client(push, "user/here")
    assert client(error, download, "user/gone", "README.md") == ("RepositoryNotFoundError", 404)
    assert client(error, download, "user/here", "README.md", revision="no") == ("RevisionNotFoundError", 404)
    assert client(error, download, "user/here", "no.txt") == ("RemoteEntryNotFoundError", 404)
    assert client(error, call_api, "create_repo", "user/here") == ("HfHubHTTPError", 409)
    assert client(error, call_api, "create_tag", "user/here", tag="t", revision="no") == ("RevisionNotFoundError", 404)
    assert client(error, push, "user/here", {"README.md": b"---\n{a: [\n---\n"}) == ("ValueError", 400)


def test_a_commit_on_an_old_state_is_refused(hub, client):
    first = client(push, "user/race")
    second = client(push, "user/race", {"a/b.txt": b"c"})
    late = client(error, push, "user/race", {"a/b.txt": b"d"}, parent_commit=first)
    assert late == ("HfHubHTTPError", 412)
    assert hub.repositories["user/race"].branches["main"] == second


def test_a_commit_with_a_wrong_part_has_no_effect(hub, client):
    first = client(push, "user/atoms")
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("no.txt")]
    arguments = ("create_commit", "user/atoms", operations)
    assert client(error, call_api, *arguments, commit_message="No")[1] == 404
    assert hub.repositories["user/atoms"].branches["main"] == first
    operations[1] = CommitOperationDelete("a/")
    client(call_api, *arguments, commit_message="Yes")
    assert set(client(pull, "user/atoms")) == {"README.md", "model.safetensors", "new.txt"}


@pytest.mark.parametrize("route", ["preupload", "batch", "upload", "verify", "commit"])
@pytest.mark.parametrize(("status", "times"), [(403, 1), (500, 20), (None, 20)])
def test_a_broken_upload_leaves_the_repository_as_it_was(route, status, times, hub, client):
    name = f"user/broken-{route}-{status}"
    first = client(push, name)
    changed = {"README.md": b"# New\n", "1.safetensors": f"1{name}".encode(), "2.safetensors": f"2{name}".encode()}
    hub.fail(route, status, times)
    assert client(error, push, name, changed) is not None
    assert hub.repositories[name].branches == {"main": first}
    assert client(pull, name) == FILES
    hub.failures.clear()
    client(push, name, changed)
    assert client(pull, name) == FILES | changed


def test_the_client_gets_over_a_hiccup(hub, client):
    hub.fail("upload", 500)
    client(push, "user/hiccup")
    assert not hub.failures["upload"]
    hub.fail("resolve", None, after=1)  # the client asks for the size first
    assert client(download, "user/hiccup", "model.safetensors") == FILES["model.safetensors"]
    assert not hub.failures["resolve"]


def test_content_that_is_not_what_was_announced_is_refused(hub, client):
    client(push, "user/content")
    data = b"announced"
    oid = hashlib.sha256(data).hexdigest()
    url = f"{hub.url}/storage/user/content/{oid}?size={len(data)}"
    for wrong in (b"announce", b"announcee"):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(urllib.request.Request(url, wrong, method="PUT"))
    assert oid not in hub.repositories["user/content"].objects
    urllib.request.urlopen(urllib.request.Request(url, data, method="PUT")).close()
    assert hub.repositories["user/content"].objects[oid] == data


def test_a_part_of_a_file_is_sent_where_it_is_asked_for(hub, client):
    client(push, "user/parts")
    url = f"{hub.url}/user/parts/resolve/main/model.safetensors"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=3-9"})) as answer:
        assert (answer.status, answer.headers["Content-Range"]) == (206, "bytes 3-9/10240")
        assert answer.read() == FILES["model.safetensors"][3:10]


def test_an_unknown_address_is_an_error_in_json(hub):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{hub.url}/api/no-such-thing")
    assert error.value.code == 404
    assert "error" in json.load(error.value)


def endpoint() -> tuple[str, str | None]:
    return huggingface_hub.constants.ENDPOINT, huggingface_hub.get_token()


def test_somebody_who_has_not_logged_in_has_no_token(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_inherited")
    with hub.client(tmp_path) as client:
        assert client(endpoint) == (hub.url, None)
