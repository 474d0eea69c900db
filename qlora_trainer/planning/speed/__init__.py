"""Estimate how long a training step takes, and put ways of taking it in the order of their time.

Start at `cost.step_seconds`, the one formula; `choice.search` takes the fastest that fits. Left out: what a way needs
in memory (planning/memory_plan.py), which is planned and not computed by a formula.
"""
