"""Tensor operations of the QLoRA trainer: torch and triton only, no knowledge of models.

Each operation is a contract in plain torch; some have a faster version with the same results (registry.py). Import
them from their modules, which README.md next to this package lists.
"""
