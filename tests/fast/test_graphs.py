"""The decode step as a CUDA graph: what is captured, replayed, kept and given up. Without a GPU a stand-in records operators
and calls them again."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llava15_fast
from llava15_fast.fast import cuda_graphs as graphs_module
from llava15_fast.fast import kv_cache, limits, text
from llava15_fast.fast.cuda_graphs import Graphs
from llava15_fast.fast.runtime import RUNTIME
from llava15_kernels import flash_attn_with_kvcache_ref
from llava15_kernels.unchecked import unchecked

OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Pool:
    """A memory pool of graphs, which torch refuses once all its graphs are gone."""

    def __init__(self):
        self.users, self.used, self.stream = 0, False, None

    def leave(self):
        self.users -= 1


class Recorder(TorchDispatchMode):
    """Operators as they are called, with the tensors and numbers that they are given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, output))
        return output


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Replayed:
    """What `CapturedStep` does, without a GPU: replaying calls the recorded operators, on the memory and with the numbers that
    they had, and asks no module for anything."""

    captured = 0
    new_pool = Pool
    new_stream = staticmethod(lambda device: object())

    def __init__(self, device, stream):
        self.stream = stream

    def capture(self, step, pool):
        assert pool.users or not pool.used, "use_count > 0 INTERNAL ASSERT FAILED"
        assert pool.stream in (None, self.stream), "one stream for a pool"
        pool.stream = self.stream
        pool.users, pool.used = pool.users + 1, True
        weakref.finalize(self, pool.leave)
        type(self).captured += 1
        with Recorder() as recorder:
            self.output = step()
        self.calls = recorder.calls
        return self.output.fill_(float("nan"))  # nothing is computed while capturing

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, output in self.calls:
            given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
            made = tensors(output)
            if all(tensor.untyped_storage()._cdata in given for tensor in made):
                if operator._schema.is_mutable:
                    operator(*args, **kwargs)
                continue  # a view sees what its base sees
            for old, new in zip(made, tensors(operator(*args, **kwargs)), strict=True):
                old.copy_(new)

    def wait(self):
        pass


@pytest.fixture
def patched(tiny, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(graphs_module, "CapturedStep", Replayed)
        # Reads no lengths, as the kernel.
        monkeypatch.setattr(unchecked("torch"), "flash_decode", lambda *args: flash_attn_with_kvcache_ref(*args[:-1]))
        monkeypatch.setattr(Graphs, "can_capture", staticmethod(lambda device: not torch.compiler.is_compiling()))
    Replayed.captured = 0
    handle = llava15_fast.patch(tiny, "auto" if torch.cuda.is_available() else "torch")
    return tiny, handle


def replays(handle, path="language_model"):
    ran = next(row for row in handle.report().rows if row.path == path).ran
    return sum(count for how, count in ran.items() if "CUDA graph" in how)


def runtime_of(model):
    return vars(model.model.language_model)[RUNTIME]


def captured(runtime):
    return [slot for slot in runtime.graphs.slots if slot.graph is not None]


def lent(layer):
    """The keys and values, with room for more, that a layer of a cache lies in."""
    return layer._loan.buffers.layers[layer._index]


def eager(model, prompt, **options):
    llava15_fast.unpatch(model)
    return model.generate(**prompt, **OPTIONS, **options)


@pytest.mark.parametrize("case", ["one_image", "batch_left_pad", "text", "video"])
def test_replayed_steps_give_the_same_ids(patched, prompts, case):
    model, handle = patched
    ids = model.generate(**prompts[case], max_new_tokens=12, **OPTIONS)
    # The first token is the prompt's, the second step is seen for the first time, the third is captured.
    assert replays(handle) == 10
    assert torch.equal(ids, eager(model, prompts[case], max_new_tokens=12))


def test_beams_reorder_the_cache_in_place(patched, prompts):
    model, handle = patched
    ids = model.generate(**prompts["one_image"], max_new_tokens=8, num_beams=3, **OPTIONS)
    assert replays(handle) == 6
    assert torch.equal(ids, eager(model, prompts["one_image"], max_new_tokens=8, num_beams=3))


def test_second_request_replays_the_first_graph(patched, prompts):
    model, handle = patched
    first = model.generate(**prompts["one_image"], max_new_tokens=6, **OPTIONS)
    gc.collect()
    before = replays(handle)
    second = model.generate(**prompts["two_images"], max_new_tokens=6, **OPTIONS)
    assert replays(handle) == before + 5  # every step but the prompt's
    if not torch.cuda.is_available():
        assert Replayed.captured == 1
    assert torch.equal(first, eager(model, prompts["one_image"], max_new_tokens=6))
    assert torch.equal(second, eager(model, prompts["two_images"], max_new_tokens=6))


def test_live_cache_keeps_its_buffers(patched, prompts):
    """Two conversations at once: the second must not write into the first one's cache."""
    model, _ = patched
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, **OPTIONS}
    first = model.generate(**prompts["text"], **options)
    kept = [layer.keys.clone() for layer in first.past_key_values.layers]
    second = model.generate(**prompts["one_image"], **options)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(first.past_key_values.layers, kept, strict=True))
    addresses = {layer.keys.data_ptr() for out in (first, second) for layer in out.past_key_values.layers}
    assert len(addresses) == 2 * len(kept)
    continued = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **OPTIONS)
    assert torch.equal(continued, eager(model, {"inputs": first.sequences}, max_new_tokens=5))
    assert torch.equal(second.sequences, eager(model, prompts["one_image"], max_new_tokens=5))


def test_outputs_belong_to_the_caller(patched, prompts):
    model, _ = patched
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 7, **OPTIONS}
    found = model.generate(**prompts["text"], **options).logits
    llava15_fast.unpatch(model)
    expected = model.generate(**prompts["text"], **options).logits
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_hidden_states_of_one_step_survive_the_next(patched, prompts):
    model, _ = patched
    text = model.model.language_model
    with torch.no_grad():
        cache = text(input_ids=prompts["text"]["input_ids"], use_cache=True).past_key_values
        steps = [torch.tensor([[token]], device=model.device) for token in (5, 6, 7, 8)]
        outputs = [text(input_ids=step, past_key_values=cache).last_hidden_state for step in steps]
        copies = [output.clone() for output in outputs[:-1]]
        text(input_ids=steps[0], past_key_values=cache)
    assert all(torch.equal(output, kept) for output, kept in zip(outputs, copies, strict=False))


def test_new_weights_are_recaptured(patched, prompts):
    model, _ = patched
    model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    state = {name: value * 1.3 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    ids = model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    assert torch.equal(ids, eager(model, prompts["text"], max_new_tokens=6))


def test_weights_changed_in_place_are_used_by_the_graph(patched, prompts):
    model, _ = patched
    model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    model.load_state_dict({name: value * 1.3 for name, value in model.state_dict().items()})
    ids = model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    if not torch.cuda.is_available():
        assert Replayed.captured == 1
    assert torch.equal(ids, eager(model, prompts["text"], max_new_tokens=6))


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_move_while_a_step_is_captured(patched, prompts, monkeypatch, when):
    """Another thread can do that; what they leave is somebody else's memory by the time of a replay."""
    model, handle = patched
    capture = graphs_module.CapturedStep.capture

    def move():
        for parameter in model.parameters():
            before = parameter.data
            parameter.data = before.clone()
            before.fill_(float("nan"))

    def capturing(self, step, pool):
        if when == "before":
            move()
        output = capture(self, step, pool)
        if when == "after":
            move()
        return output

    monkeypatch.setattr(graphs_module.CapturedStep, "capture", capturing)
    ids = model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    assert replays(handle) == 0
    monkeypatch.setattr(graphs_module.CapturedStep, "capture", capture)
    again = model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    assert replays(handle) > 0
    expected = eager(model, prompts["text"], max_new_tokens=6)
    assert torch.equal(ids, expected) and torch.equal(again, expected)


def test_a_weight_of_another_shape_at_the_same_address(patched, prompts):
    """Structured pruning."""
    model, _ = patched
    model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    mlp = model.model.language_model.layers[1].mlp
    for linear, part in ((mlp.gate_proj, slice(48)), (mlp.up_proj, slice(48)), (mlp.down_proj, (slice(None), slice(48)))):
        linear.weight.data = linear.weight.data[part]
    ids = model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    assert torch.equal(ids, eager(model, prompts["text"], max_new_tokens=6))


@pytest.mark.parametrize(
    "change",
    [
        lambda text, visual: [setattr(layer.input_layernorm, "variance_epsilon", 1.0) for layer in text.layers],
        lambda text, visual: setattr(text.norm, "variance_epsilon", 1.0),
        lambda text, visual: setattr(text.layers[1].self_attn, "scaling", 0.9),
        lambda text, visual: setattr(text.rotary_emb, "attention_scaling", 1.3),
        lambda text, visual: setattr(visual.blocks[1].norm1, "eps", 1.0),
        lambda text, visual: setattr(visual.blocks[1].attn, "scaling", 0.9),
    ],
    ids=["norms", "last norm", "scaling", "rope", "vision norm", "vision scaling"],
)
def test_changed_scalars_are_recaptured(patched, prompts, change):
    model, _ = patched
    inner = model.model

    def logits():
        options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, **OPTIONS}
        return torch.stack(model.generate(**prompts["one_image"], **options).logits)

    for _ in range(3):
        before = logits()
    change(inner.language_model, inner.visual)
    found = logits()
    llava15_fast.unpatch(model)
    torch.testing.assert_close(found, logits(), rtol=0, atol=1e-4)
    assert (found - before).abs().max() > 1e-2


def test_layer_kept_from_a_dead_cache_does_not_change(patched, prompts):
    model, _ = patched
    out = model.generate(**prompts["text"], max_new_tokens=6, return_dict_in_generate=True, **OPTIONS)
    layer = out.past_key_values.layers[-1]
    kept = [side.clone() for side in lent(layer)]
    del out
    gc.collect()
    for _ in range(2):
        model.generate(**prompts["two_images"], max_new_tokens=6, **OPTIONS)
    assert all(map(torch.equal, lent(layer), kept))


def test_borrowed_buffers_are_zeroed(patched, prompts):
    """What padding leaves unwritten is read, with a weight of 0, where transformers' own attention runs on them."""
    model, _ = patched
    model.generate(**prompts["batch_left_pad"], max_new_tokens=6, **OPTIONS)
    gc.collect()
    (buffers,) = runtime_of(model).pool.idle
    for pair in buffers.layers:
        for side in pair:
            side.fill_(float("nan"))
    details = {"max_new_tokens": 3, "output_hidden_states": True, "return_dict_in_generate": True, **OPTIONS}
    with torch.no_grad():
        cache = model(**prompts["batch_left_pad"], use_cache=True, logits_to_keep=1).past_key_values
    found = model.generate(**prompts["batch_left_pad"], **details).sequences
    assert cache.layers[0]._loan.buffers is buffers
    assert all(side.isfinite().all() for layer in cache.layers for side in lent(layer))
    assert torch.equal(found, eager(model, prompts["batch_left_pad"], max_new_tokens=3))


def test_fewer_layers_than_the_last_request_had(patched, prompts):
    model, _ = patched
    model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    gc.collect()
    model.config.text_config.num_hidden_layers = model.model.language_model.config.num_hidden_layers = 2
    ids = model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    assert torch.equal(ids, eager(model, prompts["text"], max_new_tokens=6))


def test_threads_share_the_graphs(patched, prompts):
    model, _ = patched
    cases, found = ["text", "one_image", "two_images", "video"], {}

    def work(case):
        found[case] = [model.generate(**prompts[case], max_new_tokens=8, **OPTIONS) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case in cases:
        expected = eager(model, prompts[case], max_new_tokens=8)
        assert len(found[case]) == 4 and all(torch.equal(ids, expected) for ids in found[case])


def test_a_step_runs_once_before_it_is_captured(patched, prompts, monkeypatch):
    """On the graph's own buffers: what these launches need for the first time is compiled and loaded outside of the capture."""
    model, _ = patched
    seen, capture, run = [], graphs_module.CapturedStep.capture, text.run_layers

    def capturing(self, step, pool):
        seen.append("capture")
        return capture(self, step, pool)

    def running(module, embeds, *args):
        seen.append(embeds.data_ptr())
        return run(module, embeds, *args)

    monkeypatch.setattr(graphs_module.CapturedStep, "capture", capturing)
    monkeypatch.setattr(text, "run_layers", running)
    model.generate(**prompts["text"], max_new_tokens=4, **OPTIONS)
    place = seen.index("capture")
    assert seen[place - 1] == seen[place + 1] and "capture" not in seen[place + 1 :]


def test_grown_cache_is_recaptured(patched, prompts, monkeypatch):
    monkeypatch.setattr("llava15_fast.fast.limits.KV_BLOCK", 8)
    monkeypatch.setattr("llava15_fast.fast.limits.KV_HEADROOM", 0)
    model, handle = patched
    ids = model.generate(**prompts["text"], max_new_tokens=30, **OPTIONS)
    assert replays(handle) > 20
    assert len(captured(runtime_of(model))) == 1  # no graph is captured on buffers that were given up
    assert torch.equal(ids, eager(model, prompts["text"], max_new_tokens=30))


def test_the_number_of_graphs_is_bounded(patched, prompts):
    model, _ = patched
    text = prompts["text"]["input_ids"]
    for batch in (1, 2, 3, 4):
        ids = model.generate(text.expand(batch, -1), max_new_tokens=5, **OPTIONS)
        assert (ids == ids[0]).all()
    gc.collect()
    assert len(captured(runtime_of(model))) == len(runtime_of(model).pool.idle) == limits.IDLE_BUFFERS


def test_custom_projection_is_not_captured(patched, prompts):
    """An adapter may be switched between two steps; a graph would not notice."""
    model, handle = patched
    model.model.language_model.layers[0].self_attn.o_proj = torch.nn.Sequential(
        model.model.language_model.layers[0].self_attn.o_proj
    )
    model.generate(**prompts["text"], max_new_tokens=5, **OPTIONS)
    assert replays(handle) == 0


def test_graphs_can_be_switched_off(patched, prompts):
    model, _ = patched
    handle = llava15_fast.patch(model, "torch", cuda_graph=False)
    model.generate(**prompts["text"], max_new_tokens=5, **OPTIONS)
    assert replays(handle) == 0 and not runtime_of(model).cuda_graph and not captured(runtime_of(model))
    with llava15_fast.patched(model, "torch"):
        assert runtime_of(model).cuda_graph
    assert not runtime_of(model).cuda_graph


def test_unpatch_frees_the_graphs(patched, prompts):
    model, _ = patched
    model.generate(**prompts["text"], max_new_tokens=5, **OPTIONS)
    runtime = runtime_of(model)
    assert captured(runtime) and runtime.pool.idle
    llava15_fast.unpatch(model)
    assert not captured(runtime) and not runtime.pool.idle and RUNTIME not in vars(model.model.language_model)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_captures_its_own(patched, prompts, clone):
    model, _ = patched
    expected = model.generate(**prompts["text"], max_new_tokens=5, **OPTIONS)
    twin = clone(model)
    assert captured(runtime_of(model)) and not captured(runtime_of(twin))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin.generate(**prompts["text"], max_new_tokens=5, **OPTIONS), expected)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("operation not permitted when stream is capturing")]
)
def test_no_capture_after_a_failed_one(patched, prompts, monkeypatch, caplog, error):
    tried = []

    def fail(self, step, pool):
        tried.append(step)
        raise error

    model, handle = patched
    monkeypatch.setattr(graphs_module.CapturedStep, "capture", fail)
    ids = [model.generate(**prompts[case], max_new_tokens=6, **OPTIONS) for case in ("text", "two_images", "two_images")]
    assert replays(handle) == replays(handle, "visual.encode") == 0 and len(tried) == 1
    assert f"capture failed ({error})" in caplog.text
    for case, found in zip(("text", "two_images", "two_images"), ids, strict=True):
        assert torch.equal(found, eager(model, prompts[case], max_new_tokens=6))


@pytest.fixture
def cuda(monkeypatch):
    """What `CapturedStep` asks of torch.cuda, written down; captures can be made to end with an error."""
    said = []

    class Graph:
        spoilt = False
        refused = False

        def capture_begin(self, **options):
            said.append("begin")
            if Graph.refused:
                Graph.refused = False
                raise RuntimeError("no stream to capture on")

        def capture_end(self):
            said.append("end")
            if Graph.spoilt:
                Graph.spoilt = False
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("device", "stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    Graph.said = said
    return Graph


def test_failed_capture_logs_the_error(cuda):
    """torch's error at the end of a spoilt capture is not the one that spoilt it."""

    def fail():
        assert not gc.isenabled()
        cuda.spoilt = True
        raise ValueError("the real cause")

    def capture(step):
        cuda.said.clear()
        return graphs_module.CapturedStep(torch.device("cpu"), None).capture(step, None)

    with pytest.raises(ValueError, match="the real cause"):
        capture(fail)
    assert cuda.said == ["begin", "end"] and gc.isenabled()

    def spoil():
        cuda.spoilt = True
        return "output"

    with pytest.raises(RuntimeError, match="previous error"):
        capture(spoil)
    assert cuda.said == ["begin", "end"] and gc.isenabled()
    cuda.refused = True
    with pytest.raises(RuntimeError, match="no stream"):
        capture(lambda: "output")
    assert cuda.said == ["begin"] and gc.isenabled()
    assert capture(lambda: "output") == "output" and cuda.said == ["begin", "end"] and gc.isenabled()


def test_graphs_are_freed_on_out_of_memory(patched, prompts, monkeypatch, caplog):
    """A prompt that does not fit beside them is answered, and eager's answer."""
    model, _ = patched
    model.generate(**prompts["text"], max_new_tokens=5, **OPTIONS)
    runtime, run = runtime_of(model), text.run_layers
    assert captured(runtime)

    def full_while_held(*args):
        if captured(runtime):
            raise torch.OutOfMemoryError("full")
        return run(*args)

    monkeypatch.setattr(text, "run_layers", full_while_held)
    ids = model.generate(**prompts["two_images"], max_new_tokens=1, **OPTIONS)
    assert "were freed" in caplog.text
    assert torch.equal(ids, eager(model, prompts["two_images"], max_new_tokens=1))


def test_memory_pool_is_not_reused_after_its_last_graph(patched, prompts, monkeypatch):
    """Images of new sizes push out the graphs of the old ones, before any of theirs is captured."""
    monkeypatch.setattr("llava15_fast.fast.limits.VISION_GRAPHS", 1)
    model, handle = patched

    def image(h):
        grid = torch.tensor([[1, h, 2]], device=model.device)
        return {"pixel_values": torch.ones(2 * h, 588, device=model.device), "image_grid_thw": grid}

    for h in (2, 2, 4, 6, 8, 8):
        features(model, image(h))
    assert replays(handle, "visual.encode") == 2


def test_idle_buffers_are_freed_for_a_new_request(patched, prompts, monkeypatch):
    model, _ = patched
    model.generate(**prompts["text"], max_new_tokens=5, **OPTIONS)
    gc.collect()
    (buffers,), zeros, failed = runtime_of(model).pool.idle, kv_cache._zeros, []
    held = StorageWeakRef(buffers.layers[0][0].untyped_storage())
    del buffers

    def fail_while_held(like, capacity):
        if not held.expired():
            failed.append(capacity)
            raise torch.OutOfMemoryError("no memory")
        return zeros(like, capacity)

    monkeypatch.setattr(kv_cache, "_zeros", fail_while_held)
    batch = prompts["text"]["input_ids"].expand(2, -1)
    ids = model.generate(batch, max_new_tokens=5, **OPTIONS)
    assert failed and torch.equal(ids, eager(model, {"inputs": batch}, max_new_tokens=5))


def test_moved_cache_frees_its_old_buffers(patched, prompts, monkeypatch):
    monkeypatch.setattr("llava15_fast.fast.limits.KV_BLOCK", 8)
    monkeypatch.setattr("llava15_fast.fast.limits.KV_HEADROOM", 0)
    model, _ = patched
    text = model.model.language_model
    seen, held, zeros = [], [], kv_cache._zeros

    def count(like, capacity):
        seen.append(sum(not buffers.expired() for buffers in held))
        pair = zeros(like, capacity)
        held.append(StorageWeakRef(pair[0].untyped_storage()))
        return pair

    monkeypatch.setattr(kv_cache, "_zeros", count)
    model.generate(**prompts["text"], max_new_tokens=20, **OPTIONS)
    layers = len(text.layers)
    assert len(seen) > 2 * layers and max(seen) <= layers  # never all old and all new ones


def test_inference_mode_and_no_grad_share_a_graph(patched, prompts):
    """Buffers made in inference mode could not be written to outside of it."""
    model, _ = patched
    with torch.inference_mode():
        model.generate(**prompts["text"], max_new_tokens=5, **OPTIONS)
    gc.collect()
    ids = model.generate(**prompts["text"], max_new_tokens=5, **OPTIONS)
    assert torch.equal(ids, eager(model, prompts["text"], max_new_tokens=5))


# The vision tower


def features(model, prompt):
    with torch.no_grad():
        return model.model.visual(prompt["pixel_values"], grid_thw=prompt["image_grid_thw"]).pooler_output


@pytest.mark.parametrize("case", ["one_image", "two_images"])
def test_recurring_image_sizes_are_replayed(patched, prompts, case):
    model, handle = patched
    prompt = prompts[case]
    found = [features(model, prompt) for _ in range(4)]
    assert replays(handle, "visual.encode") == 3
    other = {**prompt, "pixel_values": prompt["pixel_values"].flip(0)}
    changed = features(model, other)
    llava15_fast.unpatch(model)
    for output in found:
        torch.testing.assert_close(output, features(model, prompt), rtol=0, atol=1e-4)
    torch.testing.assert_close(changed, features(model, other), rtol=0, atol=1e-4)


def test_one_graph_serves_all_grids_of_the_same_lengths(patched, prompts):
    """Where a patch lies is an input: 4 x 6 and 6 x 4 patches are the same launches."""
    model, handle = patched
    pixels = torch.randn(24, 588, device=model.device)
    prompt = [{"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, h, 24 // h]], device=model.device)} for h in (4, 6)]
    features(model, prompt[0])  # seen as often as it takes, by one or the other
    found = [features(model, prompt[index]) for index in (0, 1, 0, 1, 0, 1)]
    assert replays(handle, "visual.encode") == 6
    llava15_fast.unpatch(model)
    expected = [features(model, one) for one in prompt]
    assert not torch.allclose(*expected)
    for output, index in zip(found, (0, 1, 0, 1, 0, 1), strict=True):
        torch.testing.assert_close(output, expected[index], rtol=0, atol=1e-4)


def test_large_images_and_changed_weights_run_without_the_old_graph(patched, prompts, monkeypatch):
    model, handle = patched
    prompt = prompts["one_image"]
    for _ in range(3):
        features(model, prompt)
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=True)
    found = features(model, prompt)
    assert replays(handle, "visual.encode") == 2
    monkeypatch.setattr("llava15_fast.fast.limits.VISION_GRAPH_ROWS", 5)
    features(model, prompt)
    features(model, prompt)
    assert replays(handle, "visual.encode") == 2
    llava15_fast.unpatch(model)
    torch.testing.assert_close(found, features(model, prompt), rtol=0, atol=1e-4)


def test_mixed_image_sizes_do_not_evict_each_other(patched):
    """Each is counted while others come between, and what is captured stays."""
    model, handle = patched

    def image(h):
        grid = torch.tensor([[1, h, 2]], device=model.device)
        return {"pixel_values": torch.ones(2 * h, 588, device=model.device), "image_grid_thw": grid}

    sizes = range(2, 14, 2)
    for h in [*sizes] * 3:
        features(model, image(h))
    assert replays(handle, "visual.encode") == 2 * len(sizes)


def test_crop_keeps_the_captured_buffers(patched, prompts):
    """The loop crops what came after the end; the next request still replays."""
    model, handle = patched
    out = model.generate(**prompts["text"], max_new_tokens=6, return_dict_in_generate=True, **OPTIONS)
    out.past_key_values.crop(-2)
    del out
    gc.collect()
    before = replays(handle)
    model.generate(**prompts["text"], max_new_tokens=6, **OPTIONS)
    assert replays(handle) == before + 5
