"""The memory, fused, for NVIDIA GPUs. Importing this package needs triton; nothing else here does."""
