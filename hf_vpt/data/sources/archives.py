"""Part of a zip archive unpacked to a folder that is there as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import datasets
from transformers.utils import logging


logger = logging.get_logger(__name__)


def cache_folder(cache_dir: str | None) -> Path:
    """Return the folder for what is unpacked: a subfolder of `cache_dir`, or of the cache of `datasets`."""
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "hf_vpt"


def content_key(members: Sequence[zipfile.ZipInfo]) -> str:
    """Return a short name for the contents of files in an archive, from the checksums it holds; nothing is read."""
    digest = hashlib.blake2b(digest_size=8)
    for member in sorted(members, key=lambda member: member.filename):
        digest.update(f"{member.filename}\0{member.CRC}\0{member.file_size}\n".encode())
    return digest.hexdigest()


def extract_folder(archive: zipfile.ZipFile, prefix: str, folder: Path) -> Path:
    """Unpack all files of an archive below a prefix, without it, unless an earlier call did.

    They are unpacked beside `folder`, which appears in one go when all of them are there.

    Args:
        archive: An open archive.
        prefix: Start of the files' names, with a slash at its end, or empty for all.
        folder: Where they go.

    Raises:
        OSError: The disk has not enough space left.
        ValueError: The archive is damaged.
    """
    if folder.is_dir():
        return folder
    members = [info for info in archive.infolist() if info.filename.startswith(prefix) and not info.is_dir()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(info.file_size for info in members), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise OSError(
            f"'{folder.parent}' has {free / 1e6:,.0f} MB left and '{archive.filename}' needs {needed / 1e6:,.0f} MB "
            "there. Unpacked images must fit on the disk: free some space, or set HF_DATASETS_CACHE to another disk."
        )
    logger.warning(f"Unpacking {len(members)} files of '{archive.filename}' to '{folder}'.")
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.draft-", dir=folder.parent))
    try:
        for info in members:
            info.filename = info.filename[len(prefix) :]  # zipfile leaves out what would lead outside of the folder
            archive.extract(info, draft)
        draft.chmod(0o755)
        os.replace(draft, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and unpacked the same
            raise
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"'{archive.filename}' is damaged ({error}). Its files must have the checksums that it holds: download "
            "it again."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
