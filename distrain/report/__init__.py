"""Reads run folders, asks launchers, and shows what it finds.

history.py  a run's numbers as curves
status.py   `distrain status`
"""
