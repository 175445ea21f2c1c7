//! Text sources, tokenizer, packed token shards and the deterministic order.
