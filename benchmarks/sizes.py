"""The published sizes of the text models, by the names of their configuration; the vision tower has its defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    max_position_embeddings: int = 32768


TEXT = {"4b": Text(2560, 9728), "8b": Text(4096, 12288)}
