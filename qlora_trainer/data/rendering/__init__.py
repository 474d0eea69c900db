"""Render rows through the chat template into token ids and labels.

Start at `renderer.Renderer`. Left out: reading rows (reading, formats) and packing (batching).
"""
