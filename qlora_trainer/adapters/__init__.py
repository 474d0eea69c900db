"""LoRA adapters on any nn.Module, and PEFT's files.

Start at `inject.add_adapters`. Left out: optimizing them (training), and folding them into weights (merging).
"""
