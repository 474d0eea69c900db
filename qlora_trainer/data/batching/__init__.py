"""Mix sources, order rows by seed and epoch, and pack them into micro-batches.

Start at `loader.StepLoader`. Left out: rendering, which happened before (preparation).
"""
