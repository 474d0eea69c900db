"""One optimizer step, and the loop around it.

Start at `loop.take_steps`. Left out: where rows come from (data), and the run directory (runs).
"""
