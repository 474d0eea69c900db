"""What every module may use: errors, progress, files written whole, hashing, units, facts about the machine.

No module below this one; nothing here knows of models, data or runs.
"""
