"""`distrain doctor`: what is wrong with a machine, before a run finds out.

`findings.py` is what a check says, `checks.py` how one is run (in a process of its own, for a limited time) and
`command.py` the list of them; `machine/` holds the checks of one machine. Imports no torch; checks that compute do.
"""
