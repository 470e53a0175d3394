"""Reads run folders, asks launchers, and shows what it finds.

history.py  a run's numbers as curves
goodput.py  what the time of a run went to, over all attempts, and what it cost
status.py   `distrain status`
"""
