"""Keep a step's memory small: what backward keeps of each layer, and optimizer state that pages.

Start at `activations.apply_policy`. Left out: what to do when memory runs out (training/recovery.py).
"""
