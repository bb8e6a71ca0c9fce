"""The model card says how to load an adapter."""

from conftest import ADAPTERS, BACKBONES
from peft import get_peft_model

from hf_vpt.hub.card import HEADING, add_loading_lines


def test_a_saved_adapter_has_a_card_with_the_import_that_loading_needs(tmp_path):
    model = get_peft_model(BACKBONES["vit"].build(), ADAPTERS["vpt_deep"].config())
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import hf_vpt\n") == 1
    assert card.startswith("---\n")
    assert card.index(HEADING) < card.index("## Model Details")


def test_only_a_card_of_pefts_is_changed(tmp_path):
    add_loading_lines(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "README.md").write_text("# My project\n")
    add_loading_lines(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# Title\n")
    add_loading_lines(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: peft\n---\n# Title\n\n## Load this adapter\n")
    assert "import hf_vpt" in text
