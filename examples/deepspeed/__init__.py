"""Accelerate with DeepSpeed, and an optimizer of ours stepping on the host."""
