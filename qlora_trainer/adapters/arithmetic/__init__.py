"""Arithmetic on trained LoRA adapters: weighted sums of several, and the linear algebra of products of thin matrices.

Start at combine.py. Left out: where the adapters come from and are written (runs/combined.py).
"""
