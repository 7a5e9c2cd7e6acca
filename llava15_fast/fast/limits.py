"""Every number of the fast path that somebody may want to tune, with the reason for it."""

KV_BLOCK = 512
"""Tokens by which KV buffers grow."""

KV_HEADROOM = 128
"""Tokens that are free after growing, so that a prompt that nearly fills its block does not grow at once again."""

IDLE_BUFFERS = 2
"""KV buffers that are kept, with their decode graph, when their cache is gone."""

VISION_GRAPHS = 8
"""Recurring image sizes whose vision blocks are kept as CUDA graphs; each holds the output for its images."""

VISION_GRAPH_ROWS = 3300
"""Rows up to which vision blocks are captured: two images of 560 x 560. Beyond, the device takes longer than the host (a model:
about 225 launches of 15 us against 2.3 ms for 1601 rows and 15.6 ms for 6401)."""

EOS_POLL = 2
"""Tokens between two polls of whether all sequences have ended."""

ID_BUFFER = 4096
"""New tokens that the loop's buffers of ids and mask have room for at first: a maximum length may be as good as none."""
