"""Write the report of a run as one HTML page that fetches nothing.

Start at `page.write_report`. Left out: recording the metrics that it draws (runs/metrics.py).
"""
