"""The kinds of adapters, a file each: what a kind adds to a model, what trains, its files, and whether it merges.

Start at table.py, which finds a kind by its name. Left out: reading and writing the files (peft_format.py), and the
state of what trains (inject.py).
"""
