"""Train rows of the input embedding and of the LM head: those of new tokens, and of some that exist.

Import from its modules; this file holds nothing.
"""
