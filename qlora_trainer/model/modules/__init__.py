"""Replace a model's own modules: 4-bit layers, experts, the input embedding, the LM head, attention.

Start at `nf4_linear.NF4Linear`. Left out: choosing which layers are replaced (model/load_plan.py).
"""
