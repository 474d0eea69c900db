"""Several adapters on one base: each is put on and taken off as a list of changes, and rows of a batch may differ.

Start at loaded.py, which makes an adapter in memory from its files. Left out: which adapters are loaded, and whether
they belong to the base (runs/adapter_set.py), and what is computed by rows (qlora_kernels.lora_rows).
"""
