"""Fold an adapter into its base and write plain weights that any tool loads, verified.

Start at `merge_run.merge_run`. Left out: containers other than safetensors.
"""
