"""A report as one HTML file, which opens without a network and runs no code but its own.

page.py      the page: what is shown in which order
sections.py  its sections for one run; examined.py: what the model does with samples
compared.py  its sections for several runs
charts.py    curves as inline SVG
markup.py    text of runs as HTML
report.css, report.js
"""

from distrain.report.html.page import render

__all__ = ["render"]
