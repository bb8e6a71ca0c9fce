"""The benchmark measures what it says, and leaves tables, numbers and pictures."""

import dataclasses
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import ViTConfig, ViTForImageClassification

from hf_vpt.benchmark import (
    BAKED,
    BENCHMARK_BACKBONES,
    COMPILED,
    FLOOR,
    VARIANTS,
    BenchmarkArguments,
    run_benchmark,
    to_markdown,
)
from hf_vpt.benchmark.measure import _share


ROOT = Path(__file__).parents[1]
TINY = ["--repeats", "2", "--num_threads", "1", "--image_size", "32"]


@pytest.fixture(scope="module", autouse=True)
def tiny_backbone():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=100
    )
    tiny = dataclasses.replace(BENCHMARK_BACKBONES["vit"], model_cls=ViTForImageClassification, config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BENCHMARK_BACKBONES, "vit", tiny)
        yield


@pytest.fixture(scope="module")
def results(tiny_backbone):
    sizes = {"num_virtual_tokens": [2, 4], "batch_size": [2], "image_size": 32, "repeats": 2, "num_threads": 1}
    return run_benchmark(BenchmarkArguments(modes=["training", "inference"], count=True, **sizes))


def test_every_variant_is_measured_in_every_round_and_compared_with_the_floor_of_its_own(results):
    rounds = {}
    for row in results:
        rounds.setdefault((row.mode, row.num_virtual_tokens), []).append(row)
    assert len(rounds) == 4
    for rows in rounds.values():
        # Baked prompts do not train.
        modes = [name for name in VARIANTS if rows[0].mode == "inference" or not name.endswith(BAKED)]
        assert [row.variant for row in rows] == modes
        for row in rows:
            ratios = [own / floor for own, floor in zip(row.seconds, rows[0].seconds, strict=True)]
            assert row.over_floor == pytest.approx(statistics.median(ratios))
            assert row.images_per_second == pytest.approx(2 / statistics.median(row.seconds))


def test_variants_train_what_they_should_and_cost_what_they_must(results):
    rows = {row.variant: row for row in results if (row.mode, row.num_virtual_tokens) == ("training", 4)}
    trained = {name: row.trained_parameters for name, row in rows.items()}
    assert trained[FLOOR] == 16
    assert trained["linear probe"] == 0
    assert trained["VPT-Deep"] == trained["VPT-Deep, concatenated"] == 2 * 4 * 16
    assert trained["LoRA, r = 8 on q and v"] == 2 * 2 * 2 * 8 * 16
    assert trained["full fine-tuning"] > 1000
    assert rows["VPT-Deep"].flops < rows["VPT-Deep, concatenated"].flops
    assert rows["VPT-Deep"].saved_bytes < rows["VPT-Deep, concatenated"].saved_bytes
    assert rows["linear probe"].flops < rows[FLOOR].flops < rows["full fine-tuning"].flops
    inference = {row.variant: row for row in results if (row.mode, row.num_virtual_tokens) == ("inference", 4)}
    assert inference[FLOOR].saved_bytes is None
    assert inference[FLOOR].flops < rows[FLOOR].flops
    # Attention alone is left of baked prompts.
    assert inference[FLOOR].flops < inference["VPT-Deep, baked"].flops < inference["VPT-Deep"].flops
    assert rows["VPT-Shallow"].flops == rows["VPT-Shallow, concatenated"].flops
    assert trained["VPT-Shallow"] == trained["VPT-Shallow, concatenated"] == 4 * 16


def test_images_of_a_batch_are_divided_among_adapters():
    sizes = {"num_virtual_tokens": [2], "batch_size": [4], "image_size": 32, "repeats": 1, "num_threads": 1}
    results = run_benchmark(BenchmarkArguments(modes=["inference"], num_adapters=[1, 4], count=True, **sizes))
    flops = {(row.variant, row.num_adapters): row.flops for row in results}
    # The keys and values of four tables instead of one, in two blocks.
    assert flops["VPT-Deep", 4] - flops["VPT-Deep", 1] == 2 * 3 * 2 * (2 * 2 * 16 * 16)
    assert flops[FLOOR, 4] == flops[FLOOR, 1]
    assert ("linear probe", 4) not in flops and ("VPT-Deep, baked", 4) not in flops
    with pytest.raises(ValueError, match="num_adapters has 8"):
        run_benchmark(BenchmarkArguments(modes=["inference"], num_adapters=[8], **sizes))


def test_variants_share_the_frozen_weights_and_none_trains_those_of_another():
    base = ViTForImageClassification(BENCHMARK_BACKBONES["vit"].config).requires_grad_(False)
    models = {name: make(_share(base), BENCHMARK_BACKBONES["vit"], 3) for name, make in VARIANTS.items()}
    frozen = {id(parameter) for parameter in base.parameters()}
    for name, model in models.items():
        own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert not own & frozen, name
        assert name == "full fine-tuning" or {id(p) for p in model.parameters()} & frozen, name


def test_where_activations_are_computed_a_second_time_baselines_do_so_as_well():
    names = ["VPT-Deep", "VPT-Shallow, concatenated", "LoRA, r = 8 on q and v", "full fine-tuning"]
    sizes = {"num_virtual_tokens": [2], "batch_size": [2], "image_size": 32, "repeats": 1, "num_threads": 1}
    kept, anew = (
        run_benchmark(BenchmarkArguments(variants=names, count=True, gradient_checkpointing=is_on, **sizes))
        for is_on in (False, True)
    )
    assert [row.variant for row in kept] == [FLOOR, *names]
    for before, after in zip(kept, anew, strict=True):
        assert after.flops > before.flops, after.variant
        assert after.saved_bytes < before.saved_bytes, after.variant


def test_every_variant_is_compiled_once_before_it_is_measured(monkeypatch):
    counters, compile_model = [], torch.compile

    def count(model):
        counters.append(CompileCounterWithBackend("eager"))
        return compile_model(model, backend=counters[-1])

    monkeypatch.setattr(torch, "compile", count)
    sizes = {"num_virtual_tokens": [2], "batch_size": [2], "image_size": 32, "repeats": 1, "num_threads": 1}
    # More with PEFT's code around them than PyTorch compiles for itself.
    variants = [name for name in VARIANTS if "VPT" in name and not name.endswith(BAKED)] + ["BPT-Deep", "VAPT"]
    variants += ["BPT-Deep, concatenated", "VAPT, concatenated"]
    results = run_benchmark(BenchmarkArguments(variants=variants, modes=["inference"], compile=True, **sizes))
    names = [row.variant for row in results if row.variant.endswith(COMPILED)]
    assert len(names) == len(counters) > 9
    found = {name: counter.frame_count for name, counter in zip(names, counters, strict=True)}
    assert found == dict.fromkeys(names, 1)


def test_a_compiled_model_is_measured_beside_the_one_that_is_not(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    sizes = {"num_virtual_tokens": [2], "batch_size": [2], "image_size": 32, "repeats": 1, "num_threads": 1}
    results = run_benchmark(BenchmarkArguments(variants=["VPT-Deep"], compile=True, count=True, **sizes))
    assert [row.variant for row in results] == [FLOOR, FLOOR + COMPILED, "VPT-Deep", "VPT-Deep" + COMPILED]
    assert results[2].flops and results[3].flops is None
    assert results[2].trained_parameters == results[3].trained_parameters
    assert "| VPT-Deep, compiled |" in to_markdown(results)


def test_an_unknown_variant_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="variants has .'VPT-Deeper'.*VPT-Deep'"):
        run_benchmark(BenchmarkArguments(variants=["VPT-Deeper"]))


def test_processor_time_of_a_gpu_is_refused():
    with pytest.raises(ValueError, match="clock is 'processor' and device 'cuda'.*measure with clock 'wall'"):
        run_benchmark(BenchmarkArguments(clock="processor", device="cuda"))


def test_the_script_leaves_a_table_numbers_and_a_picture(tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import benchmark as script
    finally:
        sys.path.pop(0)
    words = [*TINY, "--num_virtual_tokens", "2", "4", "--variants", "VPT-Deep", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark.py", *words])
    script.main()
    table = (tmp_path / "benchmark.md").read_text()
    assert table in capsys.readouterr().out
    assert "scripts/benchmark.py --repeats 2" in table
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["variant"] for row in record["results"]] == 2 * [FLOOR, "VPT-Deep"]
    assert (tmp_path / "cost_over_num_virtual_tokens.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "cost_over_batch_size.png").exists()


def test_two_processes_average_their_gradients_and_the_first_one_reports():
    launch = "accelerate.commands.launch --config_file configs/accelerate/cpu_two_processes.yaml --main_process_port 0"
    words = ["scripts/benchmark.py", "--backbone", "vit_small", "--batch_size", "2", "--num_virtual_tokens", "2"]
    command = [sys.executable, "-m", *launch.split(), *words, *TINY, "--variants", "VPT-Deep", "linear probe"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 × 1 threads" in found.stdout
    assert found.stdout.count("| VPT-Deep |") == found.stdout.count("| linear probe |") == 1


def test_a_table_has_one_line_for_each_variant(results):
    table = to_markdown(results)
    assert table.count("**training, B = 2, N = 4**") == 1
    assert table.count("| VPT-Deep |") == 4
    assert table.count("| VPT-Deep, baked |") == 2
    assert table.count("× FLOPs") == 4
