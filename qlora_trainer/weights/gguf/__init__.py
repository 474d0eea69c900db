"""Read GGUF files as a base: their names, layouts and values, without a copy of the weights.

Start at `importer.import_gguf`. Left out: writing GGUF.
"""
