"""Find out what a run needs in memory by running its training step on tensors without memory.

Start at `memory_plan.plan_memory`; `fit` chooses what fits a device. Left out: how long a step takes.
"""
