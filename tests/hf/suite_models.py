"""The models that transformers' tests run on (tests/hf/suite.py copies this file beside them)."""

import os
import unittest

import torch
import transformers
from transformers import Qwen3NextConfig

from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor

if os.environ["SUITE_CLASSES"] == "ours":
    import qwen3next.hf as classes
else:
    classes = transformers

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Tester:
    """What ModelTesterMixin asks of a model's tester."""

    base_model_class, causal_lm_class = classes.Qwen3NextModel, classes.Qwen3NextForCausalLM
    batch_size, seq_length, is_training = 13, 7, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 2

    def get_config(self):
        return Qwen3NextConfig(**SIZES)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], SIZES["vocab_size"])
        mask = torch.tril(torch.ones_like(ids))
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


if os.environ["SUITE_CLASSES"] == "ours":
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    from qwen3next.checkpoints.transformers_names import conversions

    # Classes of other names, under which their conversions are registered: under its own name, a mapping of our class
    # would also act on transformers' class.
    class RenamedModel(classes.Qwen3NextModel):
        pass

    class RenamedForCausalLM(classes.Qwen3NextForCausalLM):
        pass

    for _name in ("RenamedModel", "RenamedForCausalLM"):
        register_checkpoint_conversion_mapping(_name, conversions(Qwen3NextConfig(**SIZES)))


class Qwen3NextTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (classes.Qwen3NextModel, classes.Qwen3NextForCausalLM)

    def setUp(self):
        self.model_tester = Tester()

    if os.environ["SUITE_CLASSES"] == "ours":

        def test_reverse_loading_mapping(self, **options):
            self.all_model_classes = (RenamedModel, RenamedForCausalLM)
            super().test_reverse_loading_mapping(**options)

        def test_can_load_from_already_mapped_keys(self):
            self.all_model_classes = (RenamedModel, RenamedForCausalLM)
            super().test_can_load_from_already_mapped_keys()
