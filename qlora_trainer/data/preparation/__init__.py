"""Turn all rows into stored examples once, and report what was found.

Start at `prepare.prepare`. Left out: the order in which training takes them (batching).
"""
