"""Kernels in Triton's language, for CUDA. Each file works without Triton, and says so when asked
what it can do."""
