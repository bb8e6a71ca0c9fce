"""Who works on a trial, and whether they are still there."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil


def this_process() -> dict[str, Any]:
    """Say which process this is, so that others can tell later whether it lives."""
    return {"machine": _machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether a process lives; None where only its signs of life can tell, because it is on another machine."""
    if owner["machine"] != _machine():
        return None
    try:
        process = psutil.Process(owner["pid"])
        # Another process may have got the number; and one that was killed keeps it until its parent has asked.
        return abs(process.create_time() - owner["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _machine() -> str:
    """Name within which numbers of processes are unique: containers of one machine count their own."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()
