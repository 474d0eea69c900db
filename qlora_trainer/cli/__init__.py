"""The command line: one file for each command; no other package prints to the terminal.

Start at `app.main`, which registers the commands and turns errors into exit codes. Left out: the work itself, which
the commands leave to the other packages.
"""
