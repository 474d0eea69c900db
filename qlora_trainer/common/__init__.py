"""Share errors, progress, files written whole, hashing, units, facts about the machine.

The lowest folder: it imports none of the others, and knows nothing of data or runs. Of models it knows only what
transformers keeps private (transformers_internals.py) and what may be raised while one is read (boundary.py).
"""
