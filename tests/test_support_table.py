"""The README says what works with what, as the registry has it."""

import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent


def test_the_readme_holds_the_table_that_the_registry_prints(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from support_table import support_table

    assert support_table() in (ROOT / "README.md").read_text()
    sys.modules.pop("support_table")
