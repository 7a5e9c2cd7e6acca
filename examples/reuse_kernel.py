"""Use single kernels in another model: here RMSNorm and SwiGLU of a Llama, which this project knows nothing of.

    python examples/reuse_kernel.py

The kernels compute forward passes; where a gradient is needed, they run their eager counterparts.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from llava15_kernels import default_backend, rms_norm, silu_and_mul


class FastRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FastMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_and_mul(self.gate_proj(x), self.up_proj(x)))


device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_key_value_heads=2, **sizes)).to(device).eval()
ids = torch.randint(0, 1000, (2, 32), device=device)

with torch.inference_mode():
    expected = model(ids).logits
    for module in model.modules():
        fast = {LlamaRMSNorm: FastRMSNorm, LlamaMLP: FastMLP}.get(type(module))
        if fast is not None:
            module.__class__ = fast  # weights, hooks and names stay
    logits = model(ids).logits

print(f"backend {default_backend(device)}, largest difference {(logits - expected).abs().max().item():.1e}")
assert torch.allclose(logits, expected, atol=1e-4)
