"""A server on 127.0.0.1 that speaks to the real, unmodified client of the Hugging Face Hub.

It knows the part of the Hub's HTTP interface that pushing and loading models and data sets needs, keeps everything in
memory, and can be told to fail. The client reads its settings when it is imported, hence a process of its own:

    with LocalHub() as hub, hub.client(tmp_path, "hf_user") as call:
        call(push, "user/name")  # a function of the test's module, which uses the client as a user would
        assert "README.md" in hub.repositories["user/name"].files()

`hub.environment(tmp_path, "hf_user")` is for scripts: `subprocess.run(..., env=...)`.
"""

from . import routes  # noqa: F401, fills the table that the server answers from
from .server import LocalHub


__all__ = ["LocalHub"]
