"""Part of a zip archive unpacked to a folder that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

SECONDS_A_DAY = 24 * 3600


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
    no_room = (
        f"'{folder.parent}' has {free / 1e6:,.0f} MB left and '{archive.filename}' needs {needed / 1e6:,.0f} MB "
        "there. Unpacked images must fit on the disk: free some space, or set HF_HOME to a folder on another disk."
    )
    if needed > free:
        raise OSError(errno.ENOSPC, no_room)
    _remove_old_drafts(folder)
    logger.warning(f"Unpacking {len(members)} files of '{archive.filename}' to '{folder}'.")
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.draft-", dir=folder.parent))
    try:
        for info in members:
            info.filename = info.filename[len(prefix) :]  # zipfile leaves out what would lead outside of the folder
            archive.extract(info, draft)
        draft.chmod(0o755)
        os.replace(draft, folder)
    except OSError as error:
        # Else another process was faster, and unpacked the same.
        if not folder.is_dir():
            if error.errno == errno.ENOSPC:  # others write to the disk too
                raise OSError(errno.ENOSPC, no_room) from error
            raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(
            f"'{archive.filename}' is damaged ({error}). Its files must have the checksums that it holds: download "
            "it again."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _remove_old_drafts(folder: Path) -> None:
    """Remove what processes that were killed have left, if it is old: others may be at work now."""
    for left in folder.parent.glob(f"{folder.name}.draft-*"):
        with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
            if time.time() - left.stat().st_mtime > SECONDS_A_DAY:
                shutil.rmtree(left, ignore_errors=True)
