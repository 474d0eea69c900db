"""From data files to the packs of an optimizer step.

files -> messages -> rendering (templates, encoding) -> preparation (store) -> loader -> packing
"""
