"""Recognize what format rows have, and turn them into conversations, prompts or documents.

Start at `parse.RecordReader`. Left out: chat templates and tokens (rendering).
"""
