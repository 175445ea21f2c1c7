//! libtorch: CUDA loading, threads, determinism, tensors as bytes.
