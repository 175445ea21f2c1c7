"""DeepSeek-V3: models that everstep trains (name, [model] fields, tokenizer) and that transformers makes (name, configuration)."""

from transformers import DeepseekV3Config

PLAIN = """
architecture = "deepseek_v3"
[model.mla]
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
[model.moe]
experts = 8
experts_per_token = 2
ffn_width = 48
balance_rate = 0.01
"""

GROUPS = """
architecture = "deepseek_v3"
tied_embeddings = true
[model.rope_scaling]
kind = "yarn"
factor = 4.0
original_context = 24
[model.mla]
q_lora_rank = 24
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 12
[model.moe]
experts = 12
shared_experts = 2
experts_per_token = 3
ffn_width = 32
groups = 4
groups_per_token = 2
"""

TRAINED = [
    ("deepseek_v3", PLAIN, "byte"),
    ("deepseek_v3 with a module for multi-token prediction", PLAIN + "[model.mtp]\n", "byte"),
    ("deepseek_v3, latent queries, groups, yarn, tied", GROUPS, "bpe"),
]

SIZES = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=176,
    moe_intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
)

MADE = [
    ("deepseek_v3", DeepseekV3Config(**SIZES, q_lora_rank=24, n_group=2, topk_group=1)),
    ("deepseek_v3 without latent queries and groups", DeepseekV3Config(**SIZES, q_lora_rank=None, n_group=1, topk_group=1)),
]
