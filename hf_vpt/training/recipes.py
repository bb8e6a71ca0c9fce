"""Configuration files, which may say no more than what differs from another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


BASE_KEY = "base"


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the settings of a YAML file, and those of the file that it names as its `base`.

    `base: ../default.yaml` is a path from the folder of the file that names it. Where both files set a key, the one
    that names the other has its way; whole values are replaced, lists and mappings too. A base may have its own base.

    Args:
        path: A YAML file of lines `name: value`.

    Returns:
        The settings by name, without `base`.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file holds no mapping, its `base` is no path, or it is its own base, directly or through others.
    """
    settings: dict[str, Any] = {}
    seen: list[Path] = []
    file, named_by = Path(path), None
    while True:
        seen.append(file.resolve())
        own = _read_yaml(file, named_by)
        base = own.pop(BASE_KEY, None)
        settings = {**own, **settings}
        if base is None:
            return settings
        if not isinstance(base, str):
            raise ValueError(
                f"{file} has the base {base!r}. It must be the path of one YAML file, from the folder of this one: "
                "correct it, or leave it out."
            )
        named_by, file = file, file.parent / base
        if file.resolve() in seen:
            raise ValueError(
                f"{named_by} has the base '{base}', which has {named_by.name} as its own base, directly or through "
                "others. A file must not build upon itself: remove one of the lines that begin with base."
            )


def _read_yaml(file: Path, named_by: Path | None) -> dict[str, Any]:
    if not file.is_file():
        if named_by is not None:
            raise FileNotFoundError(
                f"There is no file '{file}', which {named_by} has as its base. The base must be the path of a YAML "
                "file from the folder of the file that names it: correct it, or leave it out."
            )
        raise FileNotFoundError(
            f"There is no configuration file '{file}'. --config needs a YAML file: correct the path, which is "
            f"relative to the working folder '{Path.cwd()}'."
        )
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a {type(settings).__name__}. It must hold lines of the form `name: value`.")
    return settings
