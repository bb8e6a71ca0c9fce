"""Who works on a trial, and whether they are still there."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil


BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def this_process() -> dict[str, Any]:
    """Say which process this is, so that others can tell later whether it lives."""
    return {"machine": _machine(), "pid": os.getpid(), "started": start_of(os.getpid())}


def is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether a process lives; None where only its signs of life can tell, because it is on another machine."""
    if owner["machine"] != _machine():
        return None
    try:
        # Another process may have got the number; and one that was killed keeps it until its parent has asked.
        is_same = abs(start_of(owner["pid"]) - owner["started"]) < 1
        return is_same and psutil.Process(owner["pid"]).status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, OSError):
        return False


def start_of(pid: int) -> float:
    """When a process was started, in a unit of the system's own: equal numbers are the same start."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return psutil.Process(pid).create_time()
    # Linux counts from its own start. Seconds since 1970 move for all processes when somebody sets the clock, and who
    # is at work would seem to be another process. The name, in brackets, may have blanks; field 22 is the start.
    return float(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])


def _machine() -> str:
    """Name within which numbers of processes are unique.

    Containers of one machine count their own, and machines may have the same name: many are called localhost. After a
    start of the machine it has another name, and whoever was at work before is told by silence.
    """
    try:
        parts = [BOOT_ID.read_text(encoding="utf-8").strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        parts = []
    return " ".join([socket.gethostname(), *parts])
