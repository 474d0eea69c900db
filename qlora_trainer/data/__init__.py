"""From data files to the packs of an optimizer step; knows no model.

reading -> formats -> rendering -> preparation -> batching. Start at `preparation.prepare.prepare`.
"""
