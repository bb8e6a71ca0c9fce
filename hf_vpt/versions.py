"""Refuses versions of Transformers and PEFT that the package is not made for, before anything of them is imported.

The package builds on parts of both that are no stable interface. Without the check, another version would end in a
bare `ImportError` or `AttributeError` somewhere below, at import or at the first model. Importing this module is the
check.
"""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement


CHECKED = ("transformers", "peft")


def check_versions() -> None:
    """Compares the installed Transformers and PEFT with the ranges in setup.cfg, read from the package's metadata.

    Raises:
        ImportError: If one of them lies outside of its range.
    """
    try:
        requirements = [Requirement(line) for line in metadata.requires("hf_vpt") or ()]
    except metadata.PackageNotFoundError:
        return  # A source checkout on PYTHONPATH has no metadata; its user chooses the versions.
    found, needed = [], []
    for requirement in requirements:
        if requirement.name not in CHECKED:
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # Where it is really missing, Python's own error says so.
        # Development versions count: only the range decides.
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}")
            needed.append(f"{requirement.name}{requirement.specifier}")
    if found:
        quoted = " ".join(f'"{requirement}"' for requirement in needed)
        raise ImportError(
            f"Found {' and '.join(found)}. This version of hf_vpt needs {' and '.join(needed)}. "
            f"Run `pip install {quoted}`, or install a version of hf_vpt that is made for yours."
        )


check_versions()
