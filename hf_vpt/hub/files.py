"""Files of a repository, in a folder or on the Hub: looked at before they are fetched, and only by their own names."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


# The largest heads (21,841 classes on a width of 1,664) take 150 MB; prompts take far less.
MAX_WEIGHTS_BYTES = 1 << 30
MAX_JSON_BYTES = 16 << 20


def fetch(
    repository: str | os.PathLike,
    name: str,
    *,
    max_bytes: int,
    subfolder: str | None = None,
    optional: bool = False,
    **download: Any,
) -> Path | None:
    """Return the path of a file in a folder or a Hub repository, downloaded if need be; None if there is none.

    Args:
        repository: Folder, or id on the Hub.
        name: Name of the file.
        max_bytes: Largest size in bytes that is fetched or returned.
        subfolder: Folder below the repository.
        optional: Whether a file that is not on this machine counts as none where the Hub cannot be asked.
        download: Further arguments of `huggingface_hub.hf_hub_download`, such as `revision` and `token`.

    Raises:
        ValueError: The file is too large, or `subfolder` leads out of the repository.
        OSError: The repository or its revision cannot be reached: there is none, it is private, or there is neither
            network nor copy.
    """
    parts = PurePosixPath(subfolder or "").parts
    if PurePosixPath(subfolder or "").is_absolute() or ".." in parts:
        raise ValueError(
            f"Found subfolder {subfolder!r}, which leads out of the repository. A folder inside of it is needed: "
            "name one relative to its root."
        )
    inside = "/".join((*parts, name))
    if Path(repository).is_dir():
        file = Path(repository) / inside
        if not file.is_file():
            return None
        _check_size(file.stat().st_size, max_bytes, str(file))
        return file
    return _download(os.fspath(repository), inside, max_bytes, optional, **download)


def _download(
    repository: str, name: str, max_bytes: int, optional: bool, revision: str | None = None, **download: Any
) -> Path | None:
    where = f"'{repository}'" + (f" at revision '{revision}'" if revision else "")
    try:
        found = hf_hub_download(repository, name, revision=revision, dry_run=True, **download)
        _check_size(found.file_size, max_bytes, f"{name} of {where}")
        # By the name that was asked for, so that the cache knows it when the Hub cannot be reached.
        return Path(hf_hub_download(repository, name, revision=revision, **download))
    except RepositoryNotFoundError as error:  # gated ones too
        raise OSError(
            f"Found no {where}: there is no such folder here, and the Hub knows no such repository or does not show "
            "it to you. A private or gated one needs a token that may read it: log in with `hf auth login` or pass "
            "token=…, and check the name."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"Found no {where}. A branch, a tag or a commit of it is needed: correct it.") from error
    except LocalEntryNotFoundError as error:
        if optional:
            return None
        raise OSError(
            f"Found no copy of {name} of {where} on this machine, and the Hub cannot be asked for it. The file is "
            "needed: connect to the network, unset HF_HUB_OFFLINE, or give a folder."
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise OSError(
            f"Found {where}, which is no folder here and cannot be a repository. A folder or a Hub id such as "
            "user/name is needed: correct it."
        ) from error
    except HfHubHTTPError as error:
        raise OSError(
            f"Found that the Hub does not give {name} of {where} ({error}). The file is needed: try again later, or "
            "give a folder."
        ) from error


def _check_size(size: int | None, max_bytes: int, name: str) -> None:
    if size is not None and size > max_bytes:
        raise ValueError(
            f"Found {name} with {size / 2**20:,.0f} MiB. A file of an adapter has at most {max_bytes >> 20:,} MiB, "
            "and more is not loaded. Look at what it is; an adapter of your own gets smaller by saving fewer modules "
            "with it (modules_to_save)."
        )
