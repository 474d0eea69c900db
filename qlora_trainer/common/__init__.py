"""Share errors, progress, files written whole, hashing, units, facts about the machine.

The lowest folder: it imports none of the others, and knows nothing of models, data or runs.
"""
