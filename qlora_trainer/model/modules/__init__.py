"""Modules that take the place of a model's own: 4-bit layers, experts, embeddings, the LM head, attention.

Start at `nf4_linear.NF4Linear`. Left out: choosing which layers are replaced (model/load_plan.py).
"""
