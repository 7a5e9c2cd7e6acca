"""Hand-written Triton kernels for LLaVA-OneVision-1.5, each with its eager reference beside it.

| function                  | file              | for                                                            |
|---------------------------|-------------------|----------------------------------------------------------------|
| `rms_norm`                | `norms.py`        | text norms, optionally with the residual addition              |
| `layer_norm`              | `norms.py`        | vision norms, the same                                         |
| `vision_rope_2d`          | `vision_rope.py`  | 2D rotary embedding of the vision tower's queries and keys     |
| `qk_norm_rope`            | `qk_norm_rope.py` | text queries and keys: head norms, rotary embedding, cache     |
| `flash_attn_varlen_func`  | `flash_attn.py`   | attention over packed sequences, full or causal, grouped heads |
| `flash_attn_with_kvcache` | `flash_decode.py` | attention of new tokens over a filled cache                    |
| `decode_attention`        | `decode_attention.py` | `qk_norm_rope` and attention of one new token per prompt       |
| `patch_merge`             | `patch_merge.py`  | class-row strip + LayerNorm + 2x2 merge                        |
| `silu_and_mul`, `gelu`    | `activation.py`   | the MLPs                                                       |
| `fused_linear`            | `linear.py`       | linear layers on up to 16 rows, with norm, SwiGLU or residual  |

The functions know torch and Triton and nothing of transformers. Importing them touches no device.
"""

from ._dispatch import INTERPRETED, default_backend
from .activation import gelu, gelu_ref, silu_and_mul, silu_and_mul_ref
from .decode_attention import decode_attention, decode_attention_ref
from .flash_attn import flash_attn_varlen_func, flash_attn_varlen_ref
from .flash_decode import flash_attn_with_kvcache, flash_attn_with_kvcache_ref
from .linear import fused_linear, fused_linear_ref
from .norms import layer_norm, layer_norm_ref, rms_norm, rms_norm_ref
from .patch_merge import patch_merge, patch_merge_ref
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from .vision_rope import vision_rope_2d, vision_rope_2d_ref

__version__ = "0.1.0"

__all__ = [
    "INTERPRETED",
    "decode_attention",
    "decode_attention_ref",
    "default_backend",
    "flash_attn_varlen_func",
    "flash_attn_varlen_ref",
    "flash_attn_with_kvcache",
    "flash_attn_with_kvcache_ref",
    "fused_linear",
    "fused_linear_ref",
    "gelu",
    "gelu_ref",
    "layer_norm",
    "layer_norm_ref",
    "patch_merge",
    "patch_merge_ref",
    "qk_norm_rope",
    "qk_norm_rope_ref",
    "rms_norm",
    "rms_norm_ref",
    "silu_and_mul",
    "silu_and_mul_ref",
    "vision_rope_2d",
    "vision_rope_2d_ref",
]
