"""Model files on disk: listed, read, quantized, written, read back. No nn.Module.

Start at `model_directory.ModelDirectory.open`. Left out: what a model does with its tensors (model).
"""
