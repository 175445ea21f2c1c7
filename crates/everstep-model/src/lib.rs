//! Decoder architectures, losses, generation and the block-wise optimizer.
