"""The command line. Every command is thin; `distrain --help` imports no torch.

main.py        `train`, `evaluate`, `predict`, `prove`, `checkpoint …` and the rest
cluster.py     `submit`, `status`, `cancel`
options.py     options that several commands have
completion.py  what a shell completes
"""
