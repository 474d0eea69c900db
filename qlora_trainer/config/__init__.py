"""Declare every config key with its type, default and meaning, and read them from YAML and the command line.

Start at `load.load_config`; the keys are in `schema`.
"""
