"""`distrain ui`: runs in a browser of this machine, live, read from their folders alone and never written to.

server.py  answers the browser: who may ask, what a page may do, events as they come
runs.py    which runs a folder holds, how they are doing, what in them may be read
curves.py  their curves with as few points as a picture needs, read once and further as they grow
details.py what a run's page shows besides: recipe, attempts, ranks, logs, checkpoints
static/    the page: modules of JavaScript and a style sheet as they are, and uPlot with its licence
"""
