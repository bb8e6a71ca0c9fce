"""Compiled models do not compile anew for every adapter and every move of a prompt."""

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, assert_same, output_of
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()


def prompt_gradients(model, name):
    return {n: p.grad for n, p in model.named_parameters() if "prompts" in n and f".{name}." in n}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_compiled_backbone_takes_other_adapters_of_the_same_shapes_without_compiling_anew(
    name, mode, pixel_values, compiler
):
    model = get_peft_model(BACKBONES["vit"].build(), ADAPTERS[name].config(prompt_dropout=0.0), adapter_name="a0")
    for number in range(1, 4):
        model.add_adapter(f"a{number}", ADAPTERS[name].config(prompt_dropout=0.0))
    model.train(mode == "train")
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    expected = {}
    for number in (*range(4), 1):
        model.set_adapter(f"a{number}")
        expected[number] = output_of(model, pixel_values).detach()
    model.get_base_model().vit.compile(backend=compiler)
    for number in (*range(4), 1):
        model.set_adapter(f"a{number}")
        torch.testing.assert_close(output_of(model, pixel_values), expected[number], rtol=1e-5, atol=1e-6)
    assert compiler.frame_count == 1
    assert len({tuple(value.flatten().tolist()) for value in expected.values()}) == 4


def test_a_compiled_backbone_compiles_a_bounded_number_of_times_while_prompts_move(pixel_values, compiler):
    model = get_peft_model(BACKBONES["vit"].build(), ADAPTERS["provpt"].config(num_virtual_tokens=4))
    compiled = torch.compile(model, backend=compiler)
    pool, generator = model.base_model.pool(), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        owner, row, block = (int(torch.randint(high, (1,), generator=generator)) for high in (3, 4, 3))
        pool[owner].move(row, block, scale=0.9)
        seen.add(tuple(model.base_model.distribution().values()))
        results = []
        for call in (model, compiled):
            model.zero_grad()
            output = output_of(model if call is model else compiled, pixel_values)
            output.square().sum().backward()
            gradients = {n: g.clone() for n, g in prompt_gradients(model, "default").items()}
            results.append({"output": output.detach(), **gradients})
        assert_same(results[1], results[0], rtol=1e-4, atol=1e-6)
    assert len(seen) > 8
    # Any number of prompts, and the few cases of none or one that PyTorch compiles for themselves.
    assert compiler.frame_count <= 6


def test_disabling_adapters_and_enabling_them_again_does_not_compile_each_time(pixel_values, compiler):
    model = get_peft_model(BACKBONES["vit"].build(), ADAPTERS["vpt_deep"].config()).eval()
    compiled = torch.compile(model, backend=compiler)
    prompted = output_of(compiled, pixel_values)
    for _ in range(5):
        with model.disable_adapter():
            bare = output_of(compiled, pixel_values)
        torch.testing.assert_close(output_of(compiled, pixel_values), prompted)
    assert not torch.allclose(bare, prompted)
    assert compiler.frame_count <= 3
