"""What users put in the place of functions, classes, methods, caches and layers: a patched model does what an unpatched one
does with it, be it an error."""

import copy
import functools
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationMixin
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3 import modeling_qwen3 as qwen3

import llava15_fast
from llava15_fast.model import modeling
from llava15_fast.model.modeling import LlavaOnevision1_5ForConditionalGeneration as Head
from llava15_fast.model.releases import CACHE

CHECKPOINT = Path(__file__).parents[1] / "golden/tiny_hub"
GREEDY = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def loaded():
    return llava15_fast.LlavaOnevision1_5ForConditionalGeneration.from_pretrained(CHECKPOINT).eval()


@pytest.fixture
def tiny(loaded, device):
    """Not read from the disk for every test."""
    return copy.deepcopy(loaded).to(device)


@pytest.fixture
def pair(tiny, request):
    """An unpatched model and a patched one, with one kind of attention."""
    tiny.set_attn_implementation(getattr(request, "param", "sdpa"))
    patched = copy.deepcopy(tiny)
    llava15_fast.patch(patched, "torch")
    return tiny, patched


with_eager = pytest.mark.parametrize("pair", ["eager"], indirect=True)


def outputs(model, prompt, **options):
    with torch.no_grad():
        logits = model(**prompt, **options).logits
    answer = model.generate(**prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)
    return logits, *answer.logits, answer.sequences


def result(run, *args):
    """What `run` gives, or its error: its kind, and how it begins."""
    try:
        return run(*args)
    except Exception as error:
        return (f"{type(error).__name__}: {str(error)[:60]}",)


def assert_same(found, expected):
    assert len(found) == len(expected), (found, expected)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, torch.Tensor) and theirs.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, equal_nan=True)
        elif isinstance(theirs, torch.Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


def differ(found, expected):
    return isinstance(found[0], str) or any(
        ours.is_floating_point() and not torch.allclose(ours, theirs, atol=1e-3)
        for ours, theirs in zip(found, expected, strict=True)
    )


def check(pair, prompt, put, undo):
    """With it, and without it again."""
    plain, patched = pair
    before = outputs(plain, prompt)
    put()
    expected, found = result(outputs, plain, prompt), result(outputs, patched, prompt)
    undo()
    assert differ(expected, before), "it changes nothing"
    assert_same(found, expected)
    assert_same(outputs(patched, prompt), before)


def changed(output):
    if output is None:
        return None
    if isinstance(output, tuple):
        return tuple(map(changed, output))
    if not isinstance(output, torch.Tensor):
        for name in ("logits", "pooler_output", "last_hidden_state"):
            if output.get(name) is not None:
                output[name] = changed(output[name])
                break
        return output
    return 0.7 * output + 0.3 * output.flip(1 if output.ndim == 4 and output.shape[-1] == 1 else -1)


def wrapped(function, wraps):
    def own(*args, **kwargs):
        return changed(function(*args, **kwargs))

    if inspect.isfunction(function):
        own.__signature__ = inspect.signature(function)  # `generate` reads it
    return functools.wraps(function)(own) if wraps else own


# Functions of modules

OF_TEXT = ["apply_rotary_pos_emb", "rotate_half", "eager_attention_forward", "repeat_kv", "create_causal_mask"]
OF_VISION = ["apply_rope_tables", "vision_rope_tables", "eager_attention_forward"]
OF_TORCH = ["linear", "silu", "softmax", "layer_norm", "gelu", "conv2d", "embedding"]
FUNCTIONS = [(qwen3, name) for name in OF_TEXT] + [(modeling, name) for name in OF_VISION]
FUNCTIONS += [(nn.functional, name) for name in OF_TORCH]


@with_eager
@pytest.mark.parametrize(("owner", "name"), FUNCTIONS, ids=lambda part: getattr(part, "__name__", part))
def test_functions(pair, prompt, monkeypatch, owner, name):
    function = getattr(owner, name)

    def mask(*args, **kwargs):
        return torch.zeros_like(function(*args, **kwargs))

    new = mask if name == "create_causal_mask" else wrapped(function, wraps=True)
    check(pair, prompt, lambda: monkeypatch.setattr(owner, name, new), monkeypatch.undo)


def test_attention_of_torch(pair, prompt, monkeypatch):
    function = nn.functional.scaled_dot_product_attention
    new = wrapped(lambda *args, **kwargs: function(*args, **kwargs), wraps=False)
    check(pair, prompt, lambda: monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", new), monkeypatch.undo)


def half(module, query, key, value, attention_mask, **kwargs):
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return changed(output), weights


def recent(*args, **kwargs):
    """Of a prompt only its second half is seen, and each token itself."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False}).clone()
    length, total = mask.shape[-2:]
    mask[..., : total // 2] = False
    rows = torch.arange(length)
    mask[..., rows, total - length + rows] = True
    return mask


@pytest.mark.parametrize("pair", ["sdpa", "eager"], indirect=True)
@pytest.mark.parametrize("where", ["for all", "here"])
@pytest.mark.parametrize("functions", ["attention", "mask"])
def test_replaced_attention_or_mask_under_a_known_name(pair, prompt, monkeypatch, functions, where):
    table, new = {"attention": (ALL_ATTENTION_FUNCTIONS, half), "mask": (ALL_MASK_ATTENTION_FUNCTIONS, recent)}[functions]
    name = pair[0].config._attn_implementation
    if functions == "mask" and name == "eager":

        def new(*args, **kwargs):
            return torch.where(recent(*args, **{**kwargs, "dtype": torch.bool}), 0.0, torch.finfo(torch.float32).min)

    mapping = table._global_mapping if where == "for all" else table._local_mapping
    check(pair, prompt, lambda: monkeypatch.setitem(mapping, name, new), monkeypatch.undo)


@pytest.mark.parametrize(
    ("part", "functions"), [("text_config", "mask"), ("text_config", "attention"), ("vision_config", "attention")]
)
def test_custom_attention_or_mask_under_a_new_name(pair, prompt, monkeypatch, functions, part):
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "own", half if functions == "attention" else sdpa_attention_forward
    )
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "own", sdpa_mask if functions == "attention" else recent)

    def choose(name):
        for model in pair:
            model.set_attn_implementation({part: name})

    check(pair, prompt, lambda: choose("own"), lambda: choose("sdpa"))


def test_attention_table_of_one_module(pair, prompt, monkeypatch):
    class Table:
        def get_interface(self, name, default):
            return half

    check(pair, prompt, lambda: monkeypatch.setattr(qwen3, "ALL_ATTENTION_FUNCTIONS", Table()), monkeypatch.undo)


# Methods of classes

CLASSES = [
    nn.Linear,
    nn.LayerNorm,
    nn.Conv2d,
    nn.Embedding,
    nn.GELU,
    type(ACT2FN["silu"]),
    qwen3.Qwen3RMSNorm,
    qwen3.Qwen3Attention,
    qwen3.Qwen3MLP,
    qwen3.Qwen3DecoderLayer,
    qwen3.Qwen3RotaryEmbedding,
    qwen3.Qwen3Model,
    modeling.LlavaOnevision1_5VisionPatchEmbed,
    modeling.LlavaOnevision1_5VisionRotaryEmbedding,
    modeling.LlavaOnevision1_5VisionAttention,
    modeling.VisionMlp,
    modeling.LlavaOnevision1_5VisionBlock,
    modeling.PatchMerger,
    modeling.LlavaOnevision1_5VisionModel,
    modeling.LlavaOnevision1_5Model,
    Head,
]
METHODS = [(cls, "forward") for cls in CLASSES]
METHODS += [(modeling.LlavaOnevision1_5VisionModel, name) for name in ("embed_patches", "encode", "merge_patches")]
METHODS += [(modeling.LlavaOnevision1_5Model, name) for name in ("get_image_features", "get_input_embeddings")]


@pytest.mark.parametrize(("cls", "name"), METHODS, ids=[f"{cls.__name__}.{name}" for cls, name in METHODS])
def test_methods_of_classes(pair, prompt, monkeypatch, cls, name):
    """As packages of kernels and of quantisation replace them, for all instances; those that are there too."""
    if name == "get_input_embeddings":
        other = copy.deepcopy(pair[0].get_input_embeddings())
        other.weight.data *= 0.5

        def new(self):
            return other

    elif name == "get_image_features":

        def new(self, *args, function=cls.get_image_features, **kwargs):
            found = function(self, *args, **kwargs)
            found.pooler_output = tuple(map(changed, found.pooler_output))
            return found

    else:
        new = wrapped(getattr(cls, name), wraps=cls is not nn.Linear)
    check(pair, prompt, lambda: monkeypatch.setattr(cls, name, new), monkeypatch.undo)


@pytest.mark.parametrize("cls", [nn.Module, qwen3.Qwen3MLP, modeling.VisionMlp, nn.LayerNorm])
def test_module_call(pair, prompt, monkeypatch, cls):
    call = nn.Module.__call__

    def own(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        return changed(output) if cls is not nn.Module or isinstance(self, qwen3.Qwen3MLP) else output

    check(pair, prompt, lambda: monkeypatch.setattr(cls, "__call__", own), monkeypatch.undo)


# The loop


def own_sample(self, input_ids, *args, **kwargs):
    """A loop of the user's own, which chooses always the same."""
    return torch.cat([input_ids, torch.full_like(input_ids[:, :1], 7)], dim=1)


def counted(method, calls):
    @functools.wraps(method)
    def own(*args, **kwargs):
        calls.append(1)
        return method(*args, **kwargs)

    return own


LOOP = [
    "_sample",
    "_prefill",
    "_update_model_kwargs_for_generation",
    "prepare_inputs_for_generation",
    "_get_logits_processor",
    "_get_stopping_criteria",
    "_prepare_cache_for_generation",
    "_expand_inputs_for_generation",
    "_has_unfinished_sequences",
]


@pytest.mark.parametrize("where", ["instance", "class"])
@pytest.mark.parametrize("name", [name for name in LOOP if hasattr(Head, name)])
def test_methods_of_the_decoding_loop(pair, prompt, monkeypatch, name, where):
    """They are called as often as unpatched."""
    counts = []
    for model in pair:
        owner = model if where == "instance" else Head
        static = isinstance(inspect.getattr_static(Head, name), staticmethod)
        new = counted(getattr(owner, name), calls := [])
        monkeypatch.setattr(owner, name, staticmethod(new) if static and where != "instance" else new)
        ids = model.generate(**prompt, **GREEDY)
        monkeypatch.undo()
        counts.append((len(calls), ids.tolist()))
    assert counts[0] == counts[1]
    assert bool(counts[0][0]) == ((name, where) != ("_sample", "instance"))  # transformers asks the class for its loop


@pytest.mark.parametrize("where", ["class", "mixin", "subclass", "custom_generate"])
def test_custom_decoding_loop(pair, prompt, monkeypatch, where):
    found = []
    for model in pair:
        if where == "subclass":
            model.__class__ = type("Own", (type(model),), {"_sample": own_sample})
        elif where != "custom_generate":
            monkeypatch.setattr(Head if where == "class" else GenerationMixin, "_sample", own_sample)
        custom = {"custom_generate": own_sample} if where == "custom_generate" else {}
        found.append(model.generate(**prompt, **GREEDY, **custom))
    assert torch.equal(*found) and found[0][0, -1] == 7


# Caches


class OwnCache(DynamicCache):
    def update(self, keys, values, *args, **kwargs):
        return super().update(0.5 * keys, values, *args, **kwargs)


class OwnLayer(DynamicLayer):
    def update(self, keys, values, *args, **kwargs):
        return super().update(0.5 * keys, values, *args, **kwargs)


def halved(update):
    return lambda *args, **kwargs: update(*(0.5 * arg if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)


def cache_with(model, owner):
    cache = DynamicCache(config=model.config.text_config)
    if owner == "cache":
        cache.update = halved(cache.update)
    elif owner == "layer":
        cache.layers[1].update = halved(cache.layers[1].update)
    elif owner == "layers":
        cache.layers = [OwnLayer() for _ in cache.layers]
    elif owner == "late layers":
        cache.layers, cache.layer_class_to_replicate = [], OwnLayer
    return cache


@pytest.mark.parametrize("owner", ["cache", "layer", "layers", "late layers", "subclass", "DynamicCache", "DynamicLayer"])
def test_custom_cache_update(pair, prompt, monkeypatch, owner):
    """As compressors of caches have it."""

    def run(model, owner):
        cache = OwnCache() if owner == "subclass" else cache_with(model, owner)
        with torch.no_grad():
            first = model(**prompt, past_key_values=cache, use_cache=True).logits
            second = model(input_ids=prompt["input_ids"][:, -1:] % 400, past_key_values=cache).logits
        twin = OwnCache() if owner == "subclass" else cache_with(model, owner)
        answer = model.generate(**prompt, **GREEDY, **{CACHE: twin}, return_dict_in_generate=True, output_logits=True)
        return first, second, cache.get_seq_length(), *answer.logits, answer.sequences

    plain, patched = pair
    before = run(plain, None)
    if owner.startswith("Dynamic"):
        cls = {"DynamicCache": DynamicCache, "DynamicLayer": DynamicLayer}[owner]
        monkeypatch.setattr(cls, "update", halved(cls.update))
    expected = run(plain, owner)
    assert_same(run(patched, owner), expected)
    assert not torch.allclose(expected[1], before[1], atol=1e-3)
    monkeypatch.undo()
    assert_same(run(patched, None), before)


# Arguments that the forward does not name


LENGTH = 18  # of the prompt
ARGUMENTS = {
    "position_bias": lambda: torch.randn(1, 6, LENGTH, LENGTH),
    "softcap": lambda: 1.0,
    "is_causal": lambda: False,
    "sliding_window": lambda: 3,
    "s_aux": lambda: torch.randn(6),
    "scaling": lambda: 0.1,
    "dropout": lambda: 0.5,
    "layer_head_mask": lambda: torch.zeros(6),
    "cu_seq_lens_q": lambda: torch.tensor([0, 9, LENGTH], dtype=torch.int32),
    "anything": lambda: 3,
    "nothing": lambda: None,
    "attention_mask of four dimensions": lambda: torch.ones(LENGTH, LENGTH, dtype=torch.bool)[None, None],
    "attention_mask of floats": lambda: torch.randn(1, 1, LENGTH, LENGTH),
    "attention_mask by kind of layer": lambda: {"full_attention": torch.randn(1, 1, LENGTH, LENGTH)},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(pair, prompt, name):
    with pair[0].device:
        argument = {name.split(" ")[0]: ARGUMENTS[name]()}
    prompt = {key: value for key, value in prompt.items() if key not in argument}

    def logits(model):
        with torch.no_grad():
            torch.manual_seed(1)
            return [model(**prompt, **argument).logits]

    def text(model):
        ids = prompt["input_ids"].clamp(max=400)
        with torch.no_grad():
            torch.manual_seed(1)
            return [model.model.language_model(input_ids=ids, **argument).last_hidden_state]

    for run in (logits, text):
        assert_same(result(run, pair[1]), result(run, pair[0]))


# Structures


def layer(model):
    return model.model.language_model.layers[1]


def own_config(model, **values):
    attention = layer(model).self_attn
    attention.config = copy.deepcopy(attention.config)
    for name, value in values.items():
        setattr(attention.config, name, value)


def with_bias(linear):
    linear.bias = nn.Parameter(torch.randn(linear.weight.shape[0], device=linear.weight.device))


def prune_heads(model):
    """Half of the heads of one layer, as structured pruning leaves them."""
    attention = layer(model).self_attn
    for name, size in (("q_proj", 48), ("k_proj", 16), ("v_proj", 16)):
        linear = getattr(attention, name)
        linear.weight, linear.out_features = nn.Parameter(linear.weight.detach()[:size].clone()), size
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.detach()[:, :48].clone())


def prune_blocks(model):
    block = model.model.visual.blocks[1].mlp
    block.fc1.weight, block.fc1.bias = nn.Parameter(block.fc1.weight.detach()[:40]), nn.Parameter(block.fc1.bias.detach()[:40])
    block.fc2.weight = nn.Parameter(block.fc2.weight.detach()[:, :40])


def sliding(model):
    config = model.model.language_model.config
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    config.sliding_window = layer(model).self_attn.sliding_window = 4
    model.model.language_model.has_sliding_layers = True


def set_in(owner, **values):
    def edit(model):
        for name, value in values.items():
            setattr(owner(model), name, value.to(model.device) if isinstance(value, nn.Module) else value)

    return edit


TEXT, VISION = (lambda model: model.model.language_model), (lambda model: model.model.visual)
BLOCK = lambda model: model.model.visual.blocks[1]  # noqa: E731
STRUCTURES = {
    "is_causal of the configuration": set_in(lambda model: TEXT(model).config, is_causal=False),
    "a layer's own configuration": lambda model: own_config(model, _attn_implementation="own"),
    "a layer's own scaling": set_in(lambda model: layer(model).self_attn, scaling=0.9),
    "a bias of q": lambda model: with_bias(layer(model).self_attn.q_proj),
    "a bias of down": lambda model: with_bias(layer(model).mlp.down_proj),
    "a bias of the head": lambda model: with_bias(model.lm_head),
    "a bias of the patch embedding": lambda model: with_bias(VISION(model).patch_embed.proj),
    "no bias of qkv": set_in(lambda model: BLOCK(model).attn.qkv, bias=None),
    "no bias of fc1": set_in(lambda model: BLOCK(model).mlp.fc1, bias=None),
    "norm1 without bias": set_in(BLOCK, norm1=nn.LayerNorm(64, bias=False)),
    "norm2 without weight": set_in(BLOCK, norm2=nn.LayerNorm(64, elementwise_affine=False)),
    "pre_layernorm without weight": set_in(VISION, pre_layernorm=nn.LayerNorm(64, elementwise_affine=False)),
    "pre_layernorm without bias": set_in(VISION, pre_layernorm=nn.LayerNorm(64, bias=False)),
    "ln_q without weight": set_in(lambda model: VISION(model).merger, ln_q=nn.LayerNorm(64, elementwise_affine=False)),
    "ln_q without bias": set_in(lambda model: VISION(model).merger, ln_q=nn.LayerNorm(64, bias=False)),
    "ln_q after merging": set_in(lambda model: VISION(model).merger, ln_q=nn.LayerNorm((1, 64))),
    "another epsilon": set_in(lambda model: BLOCK(model).norm2, eps=1.0),
    "heads pruned": prune_heads,
    "blocks pruned": prune_blocks,
    "a block with other heads": set_in(lambda model: BLOCK(model).attn, num_heads=8, head_dim=8),
    "a layer in float64": lambda model: layer(model).double(),
    "a layer in bfloat16": lambda model: layer(model).bfloat16(),
    "a norm in bfloat16": lambda model: layer(model).input_layernorm.bfloat16(),
    "a block in bfloat16": lambda model: BLOCK(model).bfloat16(),
    "a linear layer in bfloat16": lambda model: layer(model).mlp.up_proj.bfloat16(),
    "no layers": set_in(TEXT, layers=nn.ModuleList()),
    "no blocks": set_in(VISION, blocks=nn.ModuleList()),
    "fewer layers": set_in(lambda model: TEXT(model).config, num_hidden_layers=2),
    "a layer used twice": lambda model: TEXT(model).layers.__setitem__(2, layer(model)),
    "a layer removed": lambda model: TEXT(model).layers.__delitem__(1),
    "a sliding layer": sliding,
    "other positions": set_in(lambda model: TEXT(model).rotary_emb, attention_scaling=1.5),
    "other frequencies": lambda model: TEXT(model).rotary_emb.inv_freq.mul_(2),
    "dynamic positions": set_in(lambda model: TEXT(model).rotary_emb, rope_type="dynamic", max_seq_len_cached=4),
    "other vision frequencies": lambda model: VISION(model).rotary_pos_emb.inv_freq.mul_(2),
    "no norm of heads": set_in(lambda model: layer(model).self_attn, q_norm=nn.Identity()),
    "embeddings in another place": set_in(TEXT, embed_tokens=nn.Sequential(nn.Embedding(512, 48), nn.Tanh())),
    "linear layers of a subclass": lambda model: setattr(layer(model).mlp.up_proj, "__class__", type("Own", (nn.Linear,), {})),
    "a negative epsilon": set_in(lambda model: layer(model).self_attn.q_norm, variance_epsilon=-1.0),
}  # fmt: skip
THE_SAME = {"linear layers of a subclass"}


@pytest.mark.parametrize("what", STRUCTURES)
def test_structures(pair, prompt, monkeypatch, what):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "own", half)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "own", sdpa_mask)
    plain, patched = pair
    before = outputs(plain, prompt)
    for model in pair:
        torch.manual_seed(4)
        with torch.no_grad():
            STRUCTURES[what](model)
    expected = result(outputs, plain, prompt)
    assert what in THE_SAME or differ(expected, before)
    assert_same(result(outputs, patched, prompt), expected)
    # Patched again, where it is not refused: it stays an unpatched model then.
    llava15_fast.unpatch(patched)
    try:
        llava15_fast.patch(patched, "torch")
    except llava15_fast.PatchError:
        assert type(patched) is Head
    assert_same(result(outputs, patched, prompt), expected)


# Gradients through a cache


def prefix_frozen(model, ids, prefix):
    """Chunks that are trained behind a prefix that is not."""
    with torch.no_grad():
        cache = model(input_ids=ids[:, :prefix], use_cache=True).past_key_values
    chunks = [(prefix, prefix + 1), (prefix + 1, prefix + 2), (prefix + 2, ids.shape[1])]
    return [model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True).logits for start, end in chunks]


def prefix_trained(model, ids, prefix):
    """The other way round: what stands behind it only reads it."""
    cache = model(input_ids=ids[:, :prefix], use_cache=True).past_key_values
    found = [model(input_ids=ids[:, prefix : prefix + 2], past_key_values=cache, use_cache=True).logits]
    with torch.no_grad():
        found.append(model(input_ids=ids[:, prefix + 2 :], past_key_values=cache, use_cache=True).logits)
    return found


def soft_prompt(model, ids, prefix):
    """Learned embeddings before a frozen model."""
    model.requires_grad_(False)
    torch.manual_seed(1)
    model.soft = nn.Parameter(torch.randn(len(ids), prefix, 48, device=ids.device))
    cache = model(inputs_embeds=model.soft, use_cache=True).past_key_values
    return [model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(3)]


def generated_prefix(model, ids, prefix):
    """What `generate` has left in the cache, continued with a gradient."""
    options = {**GREEDY, "return_dict_in_generate": True}
    cache = model.generate(input_ids=ids[:, :prefix], **options).past_key_values
    return [model(input_ids=ids[:, at : at + 2], past_key_values=cache, use_cache=True).logits for at in (prefix, prefix + 2)]


def keys_trained(model, ids, prefix):
    """The cache itself is what is learned, as in prefix tuning."""
    model.requires_grad_(False)
    torch.manual_seed(1)
    model.soft = nn.Parameter(torch.randn(3, 2, len(ids), 2, prefix, 16, device=ids.device))
    cache = DynamicCache()
    for index, (keys, values) in enumerate(model.soft):
        cache.update(keys, values, index)
    return [model(input_ids=ids[:, at : at + 2], past_key_values=cache, use_cache=True).logits for at in (0, 2)]


@pytest.mark.parametrize("way", [prefix_frozen, prefix_trained, soft_prompt, generated_prefix, keys_trained])
def test_gradients_through_a_cache(pair, way, prefix=4):
    ids = torch.randint(0, 400, (2, 11), generator=torch.Generator().manual_seed(0)).to(pair[0].device)

    def run(model):
        found = way(model, ids, prefix)
        sum((part**2).mean() for part in found).backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert grads and all(grad.abs().max() > 0 for grad in grads)
        return *(part.detach() for part in found), *grads

    plain, patched = pair
    assert_same(run(patched), run(plain))
