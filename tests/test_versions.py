"""Versions of Transformers and PEFT outside of setup.cfg's ranges are refused at import, by name."""

from __future__ import annotations

import configparser
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from hf_vpt.versions import CHECKED, check_versions


ROOT = Path(__file__).parent.parent
RANGES = ["torch>=2.6", "transformers<6,>=5.18", "peft<0.22,>=0.21", 'pytest>=8.0; extra == "dev"']


@pytest.fixture
def install(monkeypatch):
    """Makes Python believe that these versions are installed."""

    def install(requires=RANGES, **versions):
        def of(table, name):
            if table.get(name) is None:
                raise metadata.PackageNotFoundError(name)
            return table[name]

        monkeypatch.setattr(metadata, "requires", lambda name: of({"hf_vpt": requires}, name))
        monkeypatch.setattr(metadata, "version", lambda name: of(versions, name))

    return install


def by_name(text):
    """Version specifiers of the packages in a list with one requirement a line."""
    requirements = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    return {requirement.name.lower().replace("-", "_"): requirement.specifier for requirement in requirements}


def setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return by_name(config["options"]["install_requires"] + config["options.extras_require"]["dev"])


def constraints(name):
    """The version of each package in a constraints file."""
    return {package: str(specifiers)[2:] for package, specifiers in by_name((ROOT / name).read_text()).items()}


@pytest.mark.parametrize("transformers", ["5.18.0", "5.18", "5.23.0", "5.99.1", "5.24.0.dev0", "5.19.0+local"])
@pytest.mark.parametrize("peft", ["0.21.0", "0.21.2", "0.21.3.dev0"])
def test_versions_within_the_ranges_pass(install, transformers, peft):
    install(transformers=transformers, peft=peft)
    check_versions()


@pytest.mark.parametrize("version", ["4.57.6", "5.17.0", "5.18.0.dev0", "6.0.0", "6.0.0.dev0"])
def test_another_transformers_is_refused_with_what_to_do(install, version):
    install(transformers=version, peft="0.21.0")
    with pytest.raises(ImportError) as error:
        check_versions()
    assert str(error.value) == (
        f"Found transformers {version}. This version of hf_vpt needs transformers<6,>=5.18. "
        'Run `pip install "transformers<6,>=5.18"`, or install a version of hf_vpt that is made for yours.'
    )


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0", "0.22.0rc1", "1.0.0"])
def test_another_peft_is_refused(install, version):
    install(transformers="5.18.0", peft=version)
    with pytest.raises(ImportError, match=rf"^Found peft {version}\. .* needs peft<0\.22,>=0\.21\. Run `pip install"):
        check_versions()


def test_one_error_names_both_packages(install):
    install(transformers="4.57.6", peft="0.18.1")
    with pytest.raises(ImportError, match=r"^Found transformers 4\.57\.6 and peft 0\.18\.1\.") as error:
        check_versions()
    assert '`pip install "transformers<6,>=5.18" "peft<0.22,>=0.21"`' in str(error.value)


def test_without_metadata_nothing_is_refused(install):
    install(requires=None, transformers="4.57.6", peft="0.18.1")
    check_versions()
    install(transformers=None, peft=None)
    check_versions()


def test_the_check_comes_before_transformers_peft_and_torch_are_imported(tmp_path):
    for name, lines in {
        "hf_vpt-9.0": ["Requires-Dist: transformers<6,>=5.18", "Requires-Dist: peft<0.22,>=0.21"],
        "transformers-4.57.6": [],
        "peft-0.21.0": [],
    }.items():
        folder = tmp_path / f"{name}.dist-info"
        folder.mkdir()
        title, _, version = name.partition("-")
        lines = ["Metadata-Version: 2.1", f"Name: {title}", f"Version: {version}", *lines]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
    program = """
import sys
sys.path[:0] = sys.argv[1:]
try:
    import hf_vpt
except ImportError as error:
    print(error)
print([name for name in ("transformers", "peft", "torch") if name in sys.modules])
"""
    command = [sys.executable, "-c", program, str(tmp_path), str(ROOT)]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=300).stdout
    assert printed.startswith("Found transformers 4.57.6. This version of hf_vpt needs transformers<6,>=5.18.")
    assert printed.endswith("\n[]\n")


def test_the_installed_package_knows_the_ranges_of_setup_cfg():
    installed = by_name("\n".join(metadata.requires("hf_vpt")))
    for name in CHECKED:
        assert installed[name] == setup_cfg()[name], f"{name}: setup.cfg has changed, install the package again"
        assert sorted(specifier.operator for specifier in installed[name]) == ["<", ">="], name


def test_the_lowest_environment_has_the_minimum_of_everything_in_setup_cfg():
    lowest, tested = constraints("constraints-lowest.txt"), constraints("constraints.txt")
    for name, specifiers in setup_cfg().items():
        (minimum,) = [specifier.version for specifier in specifiers if specifier.operator == ">="]
        if name in ("torch", "torchvision", "ruff"):
            assert lowest[name] == tested[name], name
        else:
            assert Version(lowest[name]) == Version(minimum), name


def test_the_tested_versions_are_within_the_ranges_of_setup_cfg():
    tested = constraints("constraints.txt")
    for name, specifiers in setup_cfg().items():
        assert specifiers.contains(tested[name]), name
