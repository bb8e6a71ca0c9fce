"""Settings that are one of a few words."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, get_args


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse a setting that is none of the words it may be.

    Args:
        name: What the setting is called where it is set.
        value: What it was set to.
        choices: The words, or the `Literal` that names them.

    Raises:
        ValueError: `value` is none of them.
    """
    words: Collection[Any] = choices if isinstance(choices, Collection) else get_args(choices)
    if value not in words:
        raise ValueError(f"{name} is {value!r}. It must be one of {list(words)}: choose one.")
