"""The command line: one file a command; the only module that draws.

Start at `app.main`, which registers the commands and turns errors into exit codes. Left out: the work itself, which
every command asks of the modules below.
"""
