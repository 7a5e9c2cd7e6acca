"""What of transformers, accelerate and Triton this project builds on is still there, in the shape that it expects.

Every name is checked by itself and a failure is a sentence that says what moved: the first thing to run on a new release.
"""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import llava15_fast
from llava15_fast.fast import generate as generation
from llava15_fast.fast import kv_cache
from llava15_fast.fast.guards import cache_guard, has_hooks, inside
from llava15_fast.model.releases import CACHE
from llava15_fast.patching.targets import TARGETS, PatchError

ROOT = Path(__file__).parents[1]

SYMBOLS = (
    "accelerate.hooks.add_hook_to_module",
    "torch._subclasses.fake_tensor.is_fake",
    "torch._C._functorch.peek_interpreter_stack",
    "torch.autograd.forward_ad._current_level",
    "torch.jit.is_tracing",
    "torch.nn.Module._apply",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
    "torch.UntypedStorage._cdata",
    "transformers.activations.ACT2FN",
    "transformers.activations.GELUActivation",
    "transformers.AutoConfig",
    "transformers.core_model_loading.SplitModulelist",
    "transformers.modeling_utils._add_variant",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention",
    "transformers.image_utils.httpx",
    "transformers.models.qwen2_vl.processing_qwen2_vl.Qwen2VLProcessor",
    "transformers.processing_utils.MultiModalData",
    "transformers.processing_utils.ProcessingKwargs",
    "transformers.processing_utils.VideosKwargs",
    "transformers.CONFIG_MAPPING",
    "transformers.AutoModel",
    "transformers.AutoModelForCausalLM",
    "transformers.AutoModelForImageTextToText",
    "transformers.AutoProcessor",
    "transformers.AutoTokenizer.from_pretrained",
    "transformers.cache_utils.Cache",
    "transformers.cache_utils.CacheLayerMixin",
    "transformers.cache_utils.DynamicCache",
    "transformers.cache_utils.Cache.batch_repeat_interleave",
    "transformers.cache_utils.Cache.batch_select_indices",
    "transformers.cache_utils.Cache.get_mask_sizes",
    "transformers.cache_utils.Cache.is_compileable",
    "transformers.cache_utils.Cache.is_croppable",
    "transformers.cache_utils.Cache.reorder_cache",
    "transformers.core_model_loading.WeightConverter",
    "transformers.generation.GenerateDecoderOnlyOutput",
    "transformers.generation.GenerationMode.GREEDY_SEARCH",
    "transformers.generation.GenerationMode.SAMPLE",
    "transformers.generation.stopping_criteria.EosTokenCriteria",
    "transformers.generation.stopping_criteria.MaxLengthCriteria",
    "transformers.generation.stopping_criteria.StoppingCriteriaList.max_length",
    "transformers.GenerationConfig",
    "transformers.ProcessorMixin.apply_chat_template",
    "transformers.GenerationMixin",
    "transformers.initialization.copy_",
    "transformers.initialization.normal_",
    "transformers.modeling_layers.GradientCheckpointingLayer",
    "transformers.modeling_outputs.BaseModelOutputWithPast",
    "transformers.modeling_outputs.BaseModelOutputWithPooling",
    "transformers.modeling_outputs.CausalLMOutputWithPast",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorKwargs",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS",
    "transformers.models.qwen3.modeling_qwen3.eager_attention_forward",
    "transformers.models.qwen3.modeling_qwen3.Qwen3Attention",
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer",
    "transformers.models.qwen3.modeling_qwen3.Qwen3MLP",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding",
    "transformers.PreTrainedConfig",
    "transformers.PreTrainedModel",
    "transformers.PreTrainedModel.loss_function",
    "transformers.ProcessorMixin",
    "transformers.Qwen3Config",
    "transformers.Qwen3Model",
    "transformers.Qwen3ForCausalLM",
    "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "transformers.utils.can_return_tuple",
    "transformers.utils.output_capturing._CAN_RECORD_REGISTRY",
    "transformers.utils.output_capturing.capture_outputs",
    "triton.errors.TritonError",
    "triton.knobs.cache",
    "triton.knobs.runtime.interpret",
    "triton.runtime.interpreter.GridExecutor",
    "triton.tools.tensor_descriptor.TensorDescriptor",
    *(f"transformers.generation.logits_process.{processor.__name__}" for processor in generation.PURE_PROCESSORS),
)
"""Names that are imported, called or looked up."""

_MIXIN = "transformers.generation.utils.GenerationMixin"
_LAYER = "transformers.cache_utils.DynamicLayer"

SIGNATURES = {
    f"{_MIXIN}._prefill": "input_ids generation_config model_kwargs is_first_iteration",
    f"{_MIXIN}._sample": ("input_ids logits_processor stopping_criteria generation_config synced_gpus streamer **model_kwargs"),
    f"{_MIXIN}._update_model_kwargs_for_generation": "outputs model_kwargs is_encoder_decoder num_new_tokens",
    f"{_MIXIN}.prepare_inputs_for_generation": (
        f"input_ids next_sequence_length {CACHE} attention_mask inputs_embeds is_first_iteration **kwargs"
    ),
    f"{_MIXIN}._expand_inputs_for_generation": "expand_size is_encoder_decoder input_ids **model_kwargs",
    f"{_LAYER}.crop": "tokens_to_remove",
    f"{_LAYER}.update": "key_states value_states *args **kwargs",
    f"{_LAYER}.lazy_initialization": "key_states value_states",
    f"{_LAYER}.reorder_cache": "beam_idx",
    f"{_LAYER}.reset": "",
    f"{_LAYER}.get_seq_length": "",
    "transformers.conversion_mapping.register_checkpoint_conversion_mapping": "model_type_or_class_name mapping overwrite",
    "transformers.core_model_loading.WeightRenaming": "source_patterns target_patterns",
    "transformers.models.qwen2_vl.modeling_qwen2_vl.PatchMerger": "dim context_dim spatial_merge_size",
    "transformers.models.qwen2_vl.modeling_qwen2_vl.VisionMlp": "dim hidden_dim hidden_act",
}
"""Parameters of what is called or overridden, without `self`: some became static methods."""

PASSED = {
    "transformers.AutoConfig.register": "model_type config exist_ok",
    "transformers.AutoModel.register": "config_class model_class exist_ok",
    "transformers.AutoProcessor.from_pretrained": "pretrained_model_name_or_path **kwargs",
    "transformers.AutoProcessor.register": "config_class processor_class exist_ok",
    "transformers.core_model_loading.WeightConverter": "source_patterns target_patterns operations",
    "transformers.GenerationConfig.get_generation_mode": "",
    "transformers.models.qwen3.modeling_qwen3.eager_attention_forward": "module query key value attention_mask scaling dropout",
    "transformers.PreTrainedConfig.from_dict": "config_dict **kwargs",
    "transformers.PreTrainedConfig.get_config_dict": "pretrained_model_name_or_path **kwargs",
    "transformers.PreTrainedModel._from_config": "config",
    "transformers.PreTrainedModel._init_weights": "module",
    "transformers.PreTrainedModel.from_pretrained": "pretrained_model_name_or_path config use_safetensors **kwargs",
    "transformers.PreTrainedModel.save_pretrained": "save_directory **kwargs",
    "transformers.ProcessorMixin.get_processor_dict": "pretrained_model_name_or_path **kwargs",
    "transformers.utils.is_flash_attn_2_available": "",
    "transformers.utils.output_capturing.capture_outputs": "tie_last_hidden_states",
}
"""Parameters that are given, or handed on, or that an override has; there may be others."""

ATTRIBUTES = {
    "": "_weight_conversions generation_config model",
    "config": "_attn_implementation",
    "generation_config": "output_attentions output_hidden_states output_logits output_scores prefill_chunk_size "
    "return_dict_in_generate do_sample eos_token_id",
    "model.language_model": "embed_tokens layers norm rotary_emb has_sliding_layers",
    "model.language_model.layers.0": "input_layernorm mlp post_attention_layernorm self_attn",
    "model.language_model.layers.0.mlp": "act_fn down_proj gate_proj up_proj",
    "model.language_model.layers.0.self_attn": "head_dim k_norm k_proj layer_idx o_proj q_norm q_proj scaling v_proj",
    "model.language_model.norm": "variance_epsilon weight",
    "model.language_model.rotary_emb": "attention_scaling inv_freq rope_type",
}
"""What is read of a loaded model and of transformers' modules in it."""

MEMBERS = {
    _LAYER: (
        "batch_repeat_interleave batch_select_indices crop get_mask_sizes get_max_length get_seq_length is_compileable "
        "is_croppable is_sliding lazy_initialization offload prefetch reorder_cache reset supports_early_init update"
    ),
}
"""Public members. One that is new may read or replace keys and values behind the KV buffers of `PooledLayer`."""

GONE = {_LAYER: {"get_max_cache_shape"}}
"""Members of an older supported release."""


def find(path):
    """The object of a dotted path, or None."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            found = getattr(found, name, None)
        return found
    return None


def moved(path, parameters=None, members=None, passed=None):
    """A sentence that says what is no longer as expected; None if all is."""
    release = f"{path.split('.')[0]} {importlib.import_module(path.split('.')[0]).__version__}"
    found = find(path)
    if found is None:
        return f"{release} has no {path} any more"
    if parameters is not None or passed is not None:
        marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        present = [f"{marks.get(p.kind, '')}{p.name}" for p in inspect.signature(found).parameters.values() if p.name != "self"]
        if passed is not None and (lost := [name for name in passed.split() if name not in present]):
            return f"{release}: {path} takes no {lost} any more, its parameters are {present}"
        if parameters is not None and present != parameters.split():
            return f"{release}: {path} has parameters {present}, expected {parameters.split()}"
    if members is not None:
        present = {name for name in dir(found) if not name.startswith("_")} - GONE.get(path, set())
        if lost := set(members.split()) - present:
            return f"{release}: {path} lost {sorted(lost)}"
        if new := present - set(members.split()):
            return f"{release}: {path} has new members {sorted(new)}: see whether they go around PreallocatedLayer"
    return None


@pytest.mark.parametrize("path", sorted(SYMBOLS))
def test_symbol(path):
    assert not (sentence := moved(path)), sentence


@pytest.mark.parametrize("path", sorted(SIGNATURES))
def test_signature(path):
    assert not (sentence := moved(path, parameters=SIGNATURES[path])), sentence


@pytest.mark.parametrize("path", sorted(PASSED))
def test_parameters_that_are_passed(path):
    assert not (sentence := moved(path, passed=PASSED[path])), sentence


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attributes(tiny, path):
    owner = tiny
    for name in path.split(".") if path else []:
        owner = getattr(owner, name)
    missing = [name for name in ATTRIBUTES[path].split() if not hasattr(owner, name)]
    assert not missing, f"transformers {transformers.__version__}: {path or 'a loaded model'} has no {missing} any more"


def test_attributes_of_stopping_criteria():
    criteria = transformers.generation.stopping_criteria
    for criterion, name in ((criteria.MaxLengthCriteria(3), "max_length"), (criteria.EosTokenCriteria(3), "eos_token_id")):
        sentence = f"transformers {transformers.__version__}: {type(criterion).__name__} has no {name} any more"
        assert hasattr(criterion, name), sentence


def imported():
    """Dotted names that the two packages import from transformers, accelerate, torch's and triton's inner modules."""
    for path in sorted([*ROOT.glob("llava15_fast/**/*.py"), *ROOT.glob("kernels/llava15_kernels/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and re.match(r"transformers|accelerate|torch\._|triton\.", node.module or ""):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_import_is_listed():
    listed = " ".join([*SYMBOLS, *SIGNATURES, *PASSED]).split()
    modules = {path.rpartition(".")[0] for path in listed} | {"transformers.logging"}
    missing = [name for name in imported() if name not in listed and name not in modules]
    assert not missing, f"add to SYMBOLS, SIGNATURES or PASSED: {missing}"


def test_peft_wrapped_module_location():
    peft = pytest.importorskip("peft")
    wrapper = importlib.import_module("peft.utils.other").ModulesToSaveWrapper
    layer = nn.Linear(2, 2)
    for wrapped in (peft.tuners.lora.Linear(layer, "default", peft.LoraConfig(r=1), r=1), wrapper(layer, "default")):
        sentence = f"peft {peft.__version__}: {type(wrapped).__name__} keeps what it wraps in {list(wrapped._modules)}"
        assert inside(wrapped) is layer, sentence


@pytest.mark.parametrize("path", sorted(MEMBERS))
def test_members(path):
    assert not (sentence := moved(path, members=MEMBERS[path])), sentence


def test_moved_symbol_is_named(monkeypatch):
    layer = transformers.cache_utils.DynamicLayer
    monkeypatch.setattr(layer, "crop", lambda self, max_length: None)
    assert moved(f"{_LAYER}.crop", parameters="tokens_to_remove") == (
        f"transformers {transformers.__version__}: {_LAYER}.crop has parameters ['max_length'], expected ['tokens_to_remove']"
    )
    monkeypatch.setattr(layer, "compress", lambda self: None, raising=False)
    assert "has new members ['compress']" in moved(_LAYER, members=MEMBERS[_LAYER])
    monkeypatch.delattr(transformers.generation.GenerationMixin, "_prefill")
    assert moved(f"{_MIXIN}._prefill").endswith(f"has no {_MIXIN}._prefill any more")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.path or 'head'}.{target.method}")
def test_target(target):
    """Each method that is replaced or passed over has the signature that it is declared with."""
    method = getattr(target.module_class, target.method, None)
    name = f"{target.module_class.__name__}.{target.method}"
    assert method is not None, f"transformers {transformers.__version__} has no {name} any more"
    found = tuple(inspect.signature(method).parameters)[1:]
    assert found == tuple(target.parameters.split()), f"transformers {transformers.__version__}: {name} has {found}"


def test_every_target_is_found_in_a_model(tiny):
    handle = llava15_fast.patch(tiny, "torch")
    names = {target.name for target in TARGETS if target.kernels}
    assert {row.path for row in handle.report().rows} == names


def test_a_moved_target_is_refused_and_named(tiny, monkeypatch):
    """What a user sees where a release moved something and these tests were not run."""
    qwen = transformers.models.qwen3.modeling_qwen3
    monkeypatch.setattr(qwen.Qwen3MLP, "forward", lambda self, hidden_states, new_option=None: hidden_states)
    with pytest.raises(PatchError, match=r"Qwen3MLP\.forward has parameters .*new_option.*, expected \('x',\)"):
        llava15_fast.patch(tiny, "torch")


def test_the_attributes_of_the_image_processor():
    processor = llava15_fast.LlavaOnevision1_5Processor.from_pretrained("assets/scenes_checkpoint").image_processor
    missing = [name for name in ("size", "merge_size", "patch_size", "temporal_patch_size") if not hasattr(processor, name)]
    assert not missing, f"transformers {transformers.__version__}: {type(processor).__name__} has no {missing} any more"
    assert {"shortest_edge", "longest_edge"} <= {*processor.size}


def test_the_attributes_of_a_cache():
    cache = transformers.DynamicCache()
    release = f"transformers {transformers.__version__}"
    present = set(vars(cache))
    assert {"layers", "layer_class_to_replicate", "offloading"} == present, f"{release}: DynamicCache holds {present}"
    present = set(vars(transformers.cache_utils.DynamicLayer()))
    assert {"keys", "values", "is_initialized"} == present, f"{release}: DynamicLayer holds {present}"
    pool = kv_cache.KVPool()
    assert cache_guard(cache, 3, kv_cache.LAYERS) is None
    pool.borrow(cache, 3, torch.empty(1, 0, 2, 4), 5)
    assert all(type(layer) is kv_cache.PooledLayer for layer in cache.layers)


def test_transformers_permanent_hooks_are_recognized(tiny):
    """Recording leaves a dormant hook on every layer; taken for a user's it would make the model slow for ever."""
    ids = torch.ones(1, 3, dtype=torch.long, device=tiny.device)
    with torch.no_grad():
        tiny(input_ids=ids, output_hidden_states=True)
    layer = tiny.model.language_model.layers[0]
    assert layer._forward_hooks, "transformers records hidden states without hooks now: see `has_hooks`"
    modules = {hook.__module__ for hook in layer._forward_hooks.values()}
    assert not has_hooks(layer), f"transformers {transformers.__version__}: its recording hooks are of {modules} now"


def test_accelerate_hook_location():
    import accelerate

    layer = nn.Linear(2, 2)
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    missing = {"_hf_hook", "_old_forward"} - layer.__dict__.keys()
    assert not missing, f"accelerate {accelerate.__version__} keeps no {missing} on a hooked module any more"
    assert has_hooks(layer)


def in_a_fresh_process(code):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_same_named_class_in_transformers_is_untouched():
    """A future release may bring its own. What `transformers` gives then is its class, said once; ours stay reachable under
    `llava15_fast` and by the published model type, and each is either patched or refused as a whole."""
    result = in_a_fresh_process("""
import logging, pickle, tempfile
logging.basicConfig()
import torch
import transformers.processing_utils
import transformers

class LlavaOnevision1_5ForConditionalGeneration(torch.nn.Module):
    pass

class LlavaOnevision1_5Model(torch.nn.Module):
    pass

theirs, their_model = LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Model
transformers.LlavaOnevision1_5ForConditionalGeneration, transformers.LlavaOnevision1_5Model = theirs, their_model
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
register_checkpoint_conversion_mapping("LlavaOnevision1_5Model", [WeightRenaming("^their", "name")])
import llava15_fast

# Their tensors keep their names.
assert [rename.source_patterns for rename in get_checkpoint_conversion_mapping("LlavaOnevision1_5Model")] == [["^their"]]
assert get_checkpoint_conversion_mapping("LlavaOnevision1_5ForConditionalGeneration") is None

assert transformers.LlavaOnevision1_5ForConditionalGeneration is theirs
assert llava15_fast.LlavaOnevision1_5ForConditionalGeneration is not theirs
auto = transformers.AutoModelForImageTextToText
model, loading = auto.from_pretrained("tests/golden/tiny_hub", output_loading_info=True)
model.eval()
assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = auto.from_pretrained(folder)
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
copy = pickle.loads(pickle.dumps(model))
assert type(copy) is type(model)
assert type(model) is llava15_fast.LlavaOnevision1_5ForConditionalGeneration
assert isinstance(model.model, llava15_fast.LlavaOnevision1_5Model)
llava15_fast.patch(model, "torch")
other = theirs()
other.model = their_model()
try:
    llava15_fast.patch(other)
except TypeError as error:
    assert "has its own LlavaOnevision1_5Model, which is not supported here" in str(error), error
    assert not any(name.startswith("_llava15") for module in other.modules() for name in module.__dict__)
else:
    raise SystemExit("another class was patched")
""")
    for name in ("LlavaOnevision1_5ForConditionalGeneration", "LlavaOnevision1_5Model"):
        assert result.stderr.count(f"transformers has its own {name}, which is not replaced") == 1, result.stderr
