"""All tunable constants of the fast path, each with its reason."""

KV_BLOCK = 512
"""Granularity of KV buffer capacity, in tokens."""

KV_HEADROOM = 128
"""Free tokens after growing, so that a prompt that nearly fills its last block does not trigger another growth at once."""

IDLE_BUFFERS = 2
"""KV buffers kept for reuse, with their decode graph, after their cache is gone."""

VISION_GRAPHS = 8
"""Recurring image sizes whose vision blocks are kept as CUDA graphs; each holds its output buffer."""

VISION_GRAPH_ROWS = 3300
"""Rows up to which vision blocks are captured: two images of 560 x 560. Beyond, the GPU is slower than the host's launches
(modelled: about 225 launches of 15 us against 2.3 ms of GPU time for 1601 rows and 15.6 ms for 6401)."""

EOS_POLL = 2
"""Tokens between asynchronous polls for the end of all sequences."""

ID_BUFFER = 4096
"""Initial capacity of the loop's id and mask buffers, in new tokens: a maximum length may be practically unbounded."""
