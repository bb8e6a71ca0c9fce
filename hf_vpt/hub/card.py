"""What stands beside an adapter in its folder or repository."""

from __future__ import annotations

from pathlib import Path


HEADING = "## Load this adapter"


def add_loading_lines(folder: str | Path) -> None:
    """Adds to a model card the lines that load the adapter, `import hf_vpt` among them.

    PEFT knows the methods of this package only after that import and cannot say so itself: without it, loading ends
    with a bare `KeyError`. A folder without a card of PEFT's, and a card that has the lines, are left alone.

    Args:
        folder: Folder with a `README.md`.
    """
    file = Path(folder) / "README.md"
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    if HEADING in text or "\nlibrary_name: peft\n" not in text:
        return
    lines = (
        f"{HEADING}\n\nThis adapter was made with hf_vpt, which has to be imported before PEFT can load it.\n\n"
        "```python\n"
        "import hf_vpt\n"
        "from peft import PeftModel\n\n"
        "model = PeftModel.from_pretrained(base_model, adapter)  # the base model above; this folder or repository\n"
        "```\n\n"
    )
    # Before the first heading of the second level: below the title, where a reader looks first.
    head, marker, rest = text.partition("\n## ")
    file.write_text(f"{head}\n{lines}{marker.lstrip()}{rest}" if marker else f"{text}\n{lines}", encoding="utf-8")
