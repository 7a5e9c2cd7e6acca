"""Where the supported releases of transformers differ."""

import inspect

from transformers import Qwen3Model

CACHE = "cache" if "cache" in inspect.signature(Qwen3Model.forward).parameters else "past_key_values"
"""The name of the key/value cache among arguments and outputs: `cache` from transformers 5.24 on.

Our own forwards take it under either name, with every release."""
