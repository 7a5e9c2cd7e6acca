"""Hand-written Triton kernels for LLaVA-OneVision-1.5, each with its eager reference beside it.

| function                 | file             | for                                                            |
|--------------------------|------------------|----------------------------------------------------------------|
| `rms_norm`               | `rms_norm.py`    | text norms, optionally with the residual addition              |
| `vision_rope_2d`         | `vision_rope.py` | 2D rotary embedding of the vision tower's queries and keys     |
| `patch_merge`            | `patch_merge.py` | class-row strip + LayerNorm + 2x2 merge                        |
| `flash_attn_varlen_func` | `flash_attn.py`  | attention over packed sequences, full or causal, grouped heads |

The functions know torch and Triton and nothing of transformers. Importing them touches no device.
"""

from ._dispatch import INTERPRETED, default_backend
from .flash_attn import flash_attn_varlen_func, flash_attn_varlen_ref
from .patch_merge import patch_merge, patch_merge_ref
from .rms_norm import rms_norm, rms_norm_ref
from .vision_rope import vision_rope_2d, vision_rope_2d_ref

__version__ = "0.1.0"

__all__ = [
    "INTERPRETED",
    "default_backend",
    "flash_attn_varlen_func",
    "flash_attn_varlen_ref",
    "patch_merge",
    "patch_merge_ref",
    "rms_norm",
    "rms_norm_ref",
    "vision_rope_2d",
    "vision_rope_2d_ref",
]
