"""Images on the command line get classes, and broken ones stop none of the others."""

import csv
import io
import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES
from peft import get_peft_model
from PIL import Image
from transformers import ViTImageProcessor

from hf_vpt import VPTConfig, load_image_classifier, prediction
from hf_vpt.prediction import Prediction, find_images, predict_images, write_predictions


NAMES = ["ape", "bee", "cat"]
SCRIPT = Path(__file__).parents[1] / "scripts" / "predict.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prediction")
    BACKBONES["vit"].build().save_pretrained(folder / "backbone")
    ViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(folder / "backbone")
    base = type(BACKBONES["vit"].build()).from_pretrained(folder / "backbone")
    config = VPTConfig(num_virtual_tokens=2, init_weights=False, label_names=NAMES)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    images = folder / "images"
    (images / "more").mkdir(parents=True)
    for number, (name, mode) in enumerate([("a.png", "RGB"), ("b.jpg", "L"), ("more/c.PNG", "RGBA")]):
        Image.effect_noise((50 + number, 40), 90).convert(mode).save(images / name)
    (images / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def classifier(folder):
    return load_image_classifier(folder / "adapter")


def test_folders_are_searched_and_other_files_left_out(folder):
    found = find_images([str(folder / "images"), str(folder / "images" / "b.jpg"), "https://example.org/x.png"])
    names = ["a.png", "b.jpg", "more/c.PNG"]
    assert found == [
        *(str(folder / "images" / name) for name in names),
        str(folder / "images" / "b.jpg"),
        "https://example.org/x.png",
    ]
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder.*correct it"):
        find_images(["missing.png"])
    with pytest.raises(FileNotFoundError, match="a folder without images"):
        find_images([str(folder / "backbone")])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_predictions_are_the_models_own_whatever_the_batch(batch_size, folder, classifier):
    model, processor = classifier
    images = find_images([str(folder / "images")])
    found = list(predict_images(model, processor, images, top_k=3, batch_size=batch_size))
    assert [prediction.image for prediction in found] == images
    for prediction_, path in zip(found, images, strict=True):
        with torch.no_grad():
            pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")
            scores = model(**pixels).logits.softmax(-1)[0]
        order = scores.argsort(descending=True).tolist()
        assert [label for label, _ in prediction_.classes] == [NAMES[index] for index in order]
        assert [score for _, score in prediction_.classes] == pytest.approx(scores[order].tolist(), abs=1e-5)


def test_a_broken_image_is_told_of_and_stops_none_of_the_others(folder, classifier, tmp_path):
    (tmp_path / "broken.png").write_bytes((folder / "images" / "a.png").read_bytes()[:100])
    images = [str(tmp_path / "broken.png"), str(folder / "images" / "a.png")]
    broken, good = predict_images(*classifier, images, top_k=1)
    assert broken.classes == () and "cannot be read" in broken.error
    assert good.error is None and len(good.classes) == 1


def test_images_come_from_the_web_up_to_a_size(folder, classifier, monkeypatch):
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder / "images"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        (here,) = predict_images(*classifier, [str(folder / "images" / "a.png")])
        (there, missing) = predict_images(*classifier, [f"{address}/a.png", f"{address}/missing.png"])
        monkeypatch.setattr(prediction, "MAX_DOWNLOAD_BYTES", 100)
        (large,) = predict_images(*classifier, [f"{address}/a.png"])
        server.shutdown()
        (spaces,) = predict_images(*classifier, ["http://127.0.0.1/a b.png"])
    assert "cannot be fetched" in spaces.error
    assert there.classes == here.classes
    assert "404" in missing.error and "more than" in large.error


def test_numbers_below_one_are_refused(classifier):
    for settings in ({"top_k": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="is 0. It must be at least 1"):
            next(predict_images(*classifier, ["x"], **settings))


def test_predictions_are_written_as_text_lines_of_json_and_csv():
    predictions = [Prediction("a.png", (("ape", 0.75), ("bee", 0.25))), Prediction("b, c.png", error="cannot be read")]
    written = {}
    for form in ("text", "jsonl", "csv"):
        stream = io.StringIO()
        assert write_predictions(predictions, stream, form) == 1
        written[form] = stream.getvalue()
    assert written["text"] == "a.png: ape 75.0%, bee 25.0%\nb, c.png: cannot be read\n"
    first, second = map(json.loads, written["jsonl"].splitlines())
    assert first["predictions"][0] == {"label": "ape", "score": 0.75}
    assert second == {"image": "b, c.png", "predictions": [], "error": "cannot be read"}
    rows = list(csv.DictReader(io.StringIO(written["csv"])))
    assert [(row["image"], row["rank"], row["label"]) for row in rows[:2]] == [
        ("a.png", "1", "ape"),
        ("a.png", "2", "bee"),
    ]
    assert rows[2]["error"] == "cannot be read"


def test_the_script_classifies_and_its_status_tells_of_broken_images(folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    output = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        str(SCRIPT),
        str(folder / "adapter"),
        str(folder / "images"),
        str(tmp_path / "broken.jpg"),
    ]
    done = subprocess.run(
        [*command, "--top_k", "2", "--format", "jsonl", "--output", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "1 of 4 images could not be read." in done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 4 and all(len(row["predictions"]) == 2 for row in rows[:3]) and "error" in rows[3]


def test_postscript_is_not_handed_to_another_program(classifier, tmp_path):
    (tmp_path / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    (result,) = predict_images(*classifier, [str(tmp_path / "drawing.eps")])
    assert "cannot identify image file" in result.error
    with pytest.raises(FileNotFoundError, match="without images"):
        find_images([str(tmp_path)])


def test_several_right_classes_do_not_share_their_probability(folder, classifier):
    model, processor = classifier
    images = find_images([str(folder / "images" / "a.png")])
    (single,) = predict_images(model, processor, images)
    model.config.problem_type = "multi_label_classification"
    try:
        (several,) = predict_images(model, processor, images)
    finally:
        model.config.problem_type = None
    with torch.no_grad():
        logits = model(**processor(Image.open(images[0]).convert("RGB"), return_tensors="pt")).logits[0]
    assert dict(several.classes) == pytest.approx(dict(zip(NAMES, logits.sigmoid().tolist())), abs=1e-5)
    assert [label for label, _ in several.classes] == [label for label, _ in single.classes]


def test_names_of_classes_do_not_command_the_console():
    stream = io.StringIO()
    write_predictions([Prediction("a.png", (("\x1b[2J", 1.0),))], stream)
    assert stream.getvalue() == "a.png: ?[2J 100.0%\n"
