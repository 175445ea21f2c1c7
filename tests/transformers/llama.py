"""Llama: models that everstep trains (name, [model] fields, tokenizer) and that transformers makes (name, configuration)."""

from transformers import LlamaConfig

TRAINED = [
    ("llama", 'architecture = "llama"\nkv_heads = 2\nrope_theta = 500000.0', "byte"),
    ("llama, tied, biases", 'architecture = "llama"\ntied_embeddings = true\nbias = true', "bpe"),
]

MADE = [
    (
        "llama",
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        ),
    ),
]
