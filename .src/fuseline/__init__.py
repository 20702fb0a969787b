"""Fuseline compiles an unmodified Hugging Face causal LM into fused Triton kernels and serves it from a paged KV cache."""

__version__ = "0.1.0"
