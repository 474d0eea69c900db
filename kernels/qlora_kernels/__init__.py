"""Tensor operations of the QLoRA trainer: torch and triton only, no knowledge of models."""
