"""transformers' `ModelTesterMixin` and `GenerationTesterMixin` on the model, plain and patched."""

import unittest
import unittest.mock

import pytest
import torch
from transformers.models.auto import modeling_auto
from transformers_tests.test_modeling_common import (
    GenerationTesterMixin,
    ModelTesterMixin,
    floats_tensor,
    ids_tensor,
    torch_device,
)

import llava15_fast
from llava15_fast import LlavaOnevision1_5Config, LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Model

MODELS = LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Model


def images(count):
    """Of 4x4 patches, which are four placeholders."""
    grids = torch.tensor([[1, 4, 4]] * count, device=torch_device)
    return {"pixel_values": floats_tensor([count * 16, 3 * 4 * 4]), "image_grid_thw": grids}


class Tester:
    """What the mixins ask for: a small configuration, and inputs with an image in every row."""

    batch_size, seq_length, is_training = 3, 11, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4
    image_id = 7
    text_config = {
        "vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers, "head_dim": 8,
        "num_attention_heads": num_attention_heads, "num_key_value_heads": 2, "intermediate_size": 37,
        "max_position_embeddings": 512, "max_window_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision_config = {"num_hidden_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 37, "patch_size": 4}

    def get_config(self):
        special = {"image_token_id": self.image_id, "video_token_id": 8, "vision_start_token_id": 5, "vision_end_token_id": 6}
        return LlavaOnevision1_5Config(text_config=self.text_config, vision_config=self.vision_config, **special)

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 10) + 10
        input_ids[:, 1:5] = self.image_id
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **images(self.batch_size)}
        return self.get_config(), inputs


class PlainTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = MODELS
    _is_composite = True

    def setUp(self):
        self.model_tester = Tester()
        # transformers' own models stand there.
        names = {LlavaOnevision1_5Config.model_type: LlavaOnevision1_5Model.__name__}
        self.enterContext(unittest.mock.patch.dict(modeling_auto.MODEL_MAPPING_NAMES, names))

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Some tests build inputs of the ids alone: with the images that belong to them."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        found = (inputs.get("input_ids", torch.zeros(1)) == Tester.image_id).sum().item() // 4
        return {**images(found), **inputs} if found else inputs

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        """The first rows; those of pixels are patches."""
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        return config, {**inputs, **images(batch_size)}


class PatchedTest(PlainTest):
    """Every model is patched when it has been made, or loaded."""

    @pytest.fixture(autouse=True)
    def patch_models(self, monkeypatch):
        for model_class in MODELS:
            made, loaded = model_class.__init__, model_class.from_pretrained.__func__

            def __init__(self, *args, made=made, **kwargs):
                made(self, *args, **kwargs)
                if self.device.type != "meta":  # `from_pretrained` has not loaded it yet
                    llava15_fast.patch(self, "torch")

            def from_pretrained(cls, *args, loaded=loaded, **kwargs):
                result = loaded(cls, *args, **kwargs)
                llava15_fast.patch(result[0] if isinstance(result, tuple) else result, "torch")
                return result

            monkeypatch.setattr(model_class, "__init__", __init__)
            monkeypatch.setattr(model_class, "from_pretrained", classmethod(from_pretrained))

    def test_the_replacements_run(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in MODELS:
            model = model_class(config).eval()
            with torch.no_grad():
                model(**inputs)
            rows = llava15_fast.patch(model, "torch").report().rows
            assert {row.path for row in rows if row.ran} == {row.path for row in rows} - {"generate"}
