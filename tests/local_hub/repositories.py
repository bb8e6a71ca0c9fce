"""What the server keeps: the files of each repository, as they were at each commit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import PurePosixPath


# As on the Hub, these and everything large go to the large file storage (LFS); the rest travels inside of a commit.
LFS_SUFFIXES = (".bin", ".ckpt", ".jpg", ".onnx", ".parquet", ".png", ".pt", ".pt2", ".safetensors", ".tar", ".zip")
LFS_SIZE = 10 * 2**20


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class File:
    data: bytes
    is_lfs: bool = False

    @property
    def oid(self) -> str:
        """What the client compares with its own file, and what it calls the file in its cache."""
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else git_oid(self.data)

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.is_lfs:
            # What git itself holds of a large file.
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {len(self.data)}\n"
            entry |= {"oid": git_oid(pointer.encode())}
            entry |= {"lfs": {"oid": self.oid, "size": len(self.data), "pointerSize": len(pointer)}}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    parent: str | None
    files: dict[str, File]

    def entries(self) -> dict[str, dict]:
        """Files and the folders that they are in, by path."""
        folders = {str(folder) for path in self.files for folder in PurePosixPath(path).parents} - {"."}
        entries = {path: {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders}
        return entries | {path: file.entry(path) for path, file in self.files.items()}


@dataclass
class Repository:
    """A model's or a data set's files.

    Attributes:
        id: Owner and name, `"user/name"`.
        private: Whether only the owner sees it.
        commits: By hash, the oldest first.
        branches: Hash of the last commit of each branch.
        tags: Hash of the commit that each tag names.
        objects: Contents of large files by SHA-256, in a commit already or only uploaded.
    """

    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self):
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("main", "initial commit", {".gitattributes": File(attributes.encode())})

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a hash names."""
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in self.find(revision).files.items()}

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{self.id} {len(self.commits)} {parent} {title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, parent, files)
        self.branches[branch] = oid
        return self.commits[oid]
