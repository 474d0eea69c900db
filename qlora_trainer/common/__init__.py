"""What every room may use: errors, progress, files written whole, hashing, units, facts about the machine.

No room below this one; nothing here knows of models, data or runs.
"""
