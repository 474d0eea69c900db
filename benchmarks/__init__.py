"""Measure what the project claims, one command each, against its peers in the same run."""
