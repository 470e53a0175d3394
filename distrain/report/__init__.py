"""Reads run folders, asks launchers, and shows what it finds.

status.py  `distrain status`
"""
