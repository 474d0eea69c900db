"""The frozen 4-bit base in memory, and its forward pass over packed documents.

Start at `load.load_base_model` and `forward.ForwardPlan`. Left out: files and tensors on disk (weights).
"""
