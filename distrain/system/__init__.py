"""The process and the machine around it. Imports no torch.

errors.py        `UserError`: what was found, what was expected, what to do
output.py        text on its way out: to the terminal, logs and files
numbers.py       numbers as people read them
terminal.py      tables and the progress line
bounded_json.py  JSON from outside, read strictly and within bounds
environment.py   the variables that a launcher sets, believed where that launcher is an ancestor
processes.py     what the kernel knows of a process
memory.py        what this process and its machine have and use
"""
