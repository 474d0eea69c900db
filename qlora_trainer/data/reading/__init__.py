"""Read rows from files: JSON, CSV, Parquet, text, compressed or not.

Start at `files.open_source`. Left out: what a row means (formats).
"""
