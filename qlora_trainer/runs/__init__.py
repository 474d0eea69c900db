"""A run directory: started, resumed, trained, saved and reported.

Start at `start.start_run` and `start.resume_run`. Left out: what a step of training is (training).
"""
