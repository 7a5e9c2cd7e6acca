"""LLaVA-OneVision-1.5 on current transformers, with hand-written Triton kernels in its forward passes.

import llava15_fast                       # registers the model with transformers
handle = llava15_fast.patch(model)        # this instance runs the kernels
model.generate(**inputs)                  # the same answer, sooner
print(handle.report())                    # what ran, and reasons for fallbacks
llava15_fast.unpatch(model)               # undo
print(llava15_fast.verify(model, inputs)) # compares patched with eager and a higher-precision reference
"""

from .versions import check_versions

check_versions()

import llava15_kernels

from .model import modeling
from .model.configuration import LlavaOnevision1_5Config, LlavaOnevision1_5TextConfig, LlavaOnevision1_5VisionConfig
from .model.modeling import LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Model, LlavaOnevision1_5VisionModel
from .model.processing import LlavaOnevision1_5Processor
from .model.registration import register

register()  # first, as it may rename classes that transformers has, too

from .patching.api import patch, patched, unpatch
from .patching.auto import disable, enable
from .patching.report import PatchHandle, Report
from .patching.targets import PatchError
from .tools.verify import Verification, verify
from .tools.warmup import warmup

__version__ = "0.1.0"

if llava15_kernels.__version__ != __version__:
    raise ImportError(
        f"llava15_fast {__version__} found llava15_kernels {llava15_kernels.__version__} at {llava15_kernels.__file__}: "
        "both come from one installation, reinstall it"
    )

__all__ = [
    "LlavaOnevision1_5Config", "LlavaOnevision1_5ForConditionalGeneration", "LlavaOnevision1_5Model",
    "LlavaOnevision1_5Processor", "LlavaOnevision1_5TextConfig", "LlavaOnevision1_5VisionConfig",
    "LlavaOnevision1_5VisionModel", "PatchError", "PatchHandle", "Report", "Verification", "disable", "enable", "modeling",
    "patch", "patched", "unpatch", "verify", "warmup",
]  # fmt: skip
