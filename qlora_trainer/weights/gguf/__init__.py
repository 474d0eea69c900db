"""GGUF files as a base: their names, layouts and values, read where they are.

Start at `importer.import_gguf`. Left out: writing GGUF.
"""
