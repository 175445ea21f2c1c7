"""GPT-2: models that everstep trains (name, [model] fields, tokenizer) and that transformers makes (name, configuration)."""

from transformers import GPT2Config

TRAINED = [
    ("gpt2", 'architecture = "gpt2"', "byte"),
    ("gpt2, untied, without biases", 'architecture = "gpt2"\nmlp = "gelu_tanh"\nbias = false\ntied_embeddings = false', "bpe"),
]

MADE = [
    ("gpt2", GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_positions=128)),
    (
        "gpt2, untied, gelu",
        GPT2Config(
            vocab_size=300,
            n_embd=64,
            n_inner=96,
            n_layer=2,
            n_head=4,
            n_positions=128,
            activation_function="gelu",
            tie_word_embeddings=False,
        ),
    ),
]
