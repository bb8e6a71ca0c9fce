"""What works with which backbone, from the registry: the table in README.md.

    python scripts/support_table.py

A test compares the README with what this prints.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import CONFIG_MAPPING, MODEL_MAPPING

from hf_vpt import BACKBONES, METHODS, BackboneRecord
from hf_vpt.attention import InterfaceAttention


# What a record may refuse, by the column's title.
COLUMNS = {
    "VPT": "vpt",
    "VAPT": "vapt",
    "PRO-VPT": "provpt",
    "BPT": "bpt",
    "shallow": "shallow",
}
BACKENDS = {"_supports_sdpa": "sdpa", "_supports_flex_attn": "flex", "_supports_flash_attn": "flash"}


def attention_backends(record: BackboneRecord) -> str:
    """The attention functions that a family can run with prompts."""
    if not isinstance(record.access, InterfaceAttention):
        return "its own"
    model_cls = MODEL_MAPPING[CONFIG_MAPPING[record.model_type]]
    return ", ".join(["eager", *(name for flag, name in BACKENDS.items() if getattr(model_cls, flag))])


def support_table() -> str:
    """The table and, below it, the reasons for what is refused, in Markdown."""
    assert set(COLUMNS.values()) == METHODS.keys() | {"shallow"}, "a method has no column"
    titles = ["backbone", "`model_type`", *COLUMNS, "`pool_prompts`", "attention"]
    lines = [" | ".join(titles), " | ".join("---" for _ in titles)]
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in BACKBONES.values():
        cells = [record.title, f"`{record.model_type}`"]
        cells += ["refused" if name in record.refused else "yes" for name in COLUMNS.values()]
        cells += ["yes" if record.pooler else "–", attention_backends(record)]
        lines.append(" | ".join(cells))
        for name, reason in record.refused.items():
            title = next(title for title, column in COLUMNS.items() if column == name)
            reasons.setdefault((title, reason), []).append(record.title)
    table = "\n".join(f"| {line} |" for line in lines)
    notes = [f"- {title} with {' and '.join(families)}: {reason}." for (title, reason), families in reasons.items()]
    records = BACKBONES.values()
    notes += [
        f"- `pool_prompts` with all but {_titles(r for r in records if r.pooler)}: other families have no module that "
        "averages tokens, of which prompt outputs could be some.",
        f'- `set_insertion("tokens")` with {_titles(r for r in records if r.windows)}: tokens lie on a grid that '
        "attention splits into windows, and prompts have no place on it.",
        f"- VAPT with a {_titles(r for r in records if r.shuffles_patches)} that hides patches: it pools the whole "
        "grid. Set `config.mask_ratio = 0.0`.",
    ]
    return "\n".join([table, "", "Refused:", "", *notes])


def _titles(records: Iterable[BackboneRecord]) -> str:
    return " and ".join(record.title for record in records)


if __name__ == "__main__":
    print(support_table())
