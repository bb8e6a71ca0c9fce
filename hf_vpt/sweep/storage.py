"""Optuna's studies: opened by processes that may all come first, and only for what they are about."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from ..training.identity import tell_apart


_ATTEMPTS_TO_OPEN = 10


def import_optuna() -> Any:
    """Return Optuna, quiet about everything but trouble.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "Found no Optuna. Sweeps write down their trials with it: install it with `pip install hf_vpt[sweep]`."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(url: str, name: str, identity: Mapping[str, Any] | None, greater_is_better: bool) -> Any:
    """Open a study, or make it, and return the storage that it is in.

    Args:
        url: A database URL that Optuna knows.
        name: Name of the study.
        identity: What the study is about; None for whatever it is about.
        greater_is_better: Which way its values are to go.

    Raises:
        ValueError: The study is about something else.
    """
    optuna = import_optuna()
    from sqlalchemy.exc import SQLAlchemyError  # of Optuna's

    direction = "maximize" if greater_is_better else "minimize"
    for attempt in range(_ATTEMPTS_TO_OPEN):
        try:
            storage = optuna.storages.get_storage(_storage(optuna, url))
            optuna.create_study(study_name=name, storage=storage, direction=direction, load_if_exists=True)
            break
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError):
            # Two processes that come first make the same tables, and one of them is told that they exist.
            if attempt == _ATTEMPTS_TO_OPEN - 1:
                raise
            time.sleep(0.2 * (attempt + 1))
    if identity is not None:
        _check_identity(storage, name, json.loads(json.dumps(identity)))
    return storage


def _storage(optuna: Any, url: str) -> Any:
    if not url.startswith("sqlite:"):
        return url
    # Writers of a file wait for each other; five seconds, the default, are short where many read.
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})


def _check_identity(storage: Any, name: str, identity: dict[str, Any]) -> None:
    study_id = storage.get_study_id_from_name(name)
    known = storage.get_study_user_attrs(study_id).get("identity")
    if known is None:
        storage.set_study_user_attr(study_id, "identity", identity)
        return
    if changed := tell_apart(known, identity):
        raise ValueError(
            f"Found the study '{name}' made with {changed[0]}, and a sweep with {changed[1]}. A sweep goes on with "
            "the settings it began with: use another output_dir (in a common storage, another study_name too), or the "
            "old settings."
        )
