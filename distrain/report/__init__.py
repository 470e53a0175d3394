"""Reads run folders, asks launchers, and shows what it finds.

status.py       `distrain status`
logs.py         `distrain logs`
history.py      the numbers of a run as curves
goodput.py      what the time of a run went to, over all attempts, and what it cost
contents.py     what a report holds, as values: attempts.py, curves.py, differences.py, recipe_rows.py
html/           it as one HTML file; markdown.py, pictures.py
ending.py       it at the end of a run with log.report
differences.py  `distrain compare`
ui/             `distrain ui`
watching.py     `distrain watch`, with text_curves.py, which draws with characters
"""
