"""A patched model under torch.compile: one graph, and no new one for every size."""

import pytest
import torch
import torch._dynamo.testing

import llava15_fast
from llava15_fast.model.modeling import VisionLayout


@pytest.fixture(params=["torch", "triton"])
def patched(request, tiny):
    torch._dynamo.reset()
    llava15_fast.patch(tiny, request.param)
    return tiny


def compiled(function):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def kernels_in(counter):
    return any("llava15" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)


@pytest.mark.slow
def test_text_model_compiles_to_one_graph(patched, device):
    text = patched.model.language_model

    def forward(embeds):
        return text(inputs_embeds=embeds, use_cache=False).last_hidden_state

    fast, counter = compiled(forward)
    with torch.no_grad():
        for length in (7, 9, 12, 20):
            embeds = torch.randn(2, length, 48, device=device)
            torch.testing.assert_close(fast(embeds), forward(embeds))
    assert counter.frame_count <= 2
    assert kernels_in(counter), "not the original"


@pytest.mark.slow
def test_vision_tower_compiles_to_one_graph(patched, device):
    visual = patched.model.visual

    def forward(pixels, layout):
        return visual(pixels, layout=layout).pooler_output

    fast, counter = compiled(forward)
    with torch.no_grad():
        for h, w in ((4, 4), (4, 6), (8, 6), (10, 4)):
            layout = VisionLayout.from_grids([[1, h, w], [1, 2, w]], 2, device)
            pixels = torch.randn(h * w + 2 * w, 588, device=device)
            torch.testing.assert_close(fast(pixels, layout), forward(pixels, layout))
            grid = torch.tensor([[1, h, w], [1, 2, w]], device=device)
            assert torch.equal(forward(pixels, layout), visual(pixels, grid_thw=grid).pooler_output)
    assert counter.frame_count <= 2
    assert kernels_in(counter), "not the original"


@pytest.mark.slow
def test_user_compiles_the_whole_model(patched, prompts):
    """With a cache and with `generate`: graphs may break, answers may not."""
    inputs = prompts["one_image"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = patched.generate(**inputs, **options)
    patched.forward = torch.compile(patched.forward, backend="eager")
    assert torch.equal(patched.generate(**inputs, **options), expected)


def test_decoding_with_a_cache_compiles_once_for_all_lengths(patched, golden):
    """A prompt, a token, a token at any length; no graph breaks."""
    ids, text = golden["text"][0]["input_ids"][:, :4], patched.model.language_model
    text.layers, text.config.num_hidden_layers, text.config.layer_types = text.layers[:1], 1, text.config.layer_types[:1]
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = patched.generate(ids, **options)
    patched.forward, counter = compiled(patched.forward)
    assert torch.equal(patched.generate(ids, **options), expected)
    assert counter.frame_count <= 3
