"""What a run leaves on the disk. Imports no torch and knows no launcher.

folder.py       the run folder: recipe, metrics.jsonl, marks of how it ended
lease.py        which attempt may write
heartbeat.py    what each rank does, for whoever looks from outside
stacks.py       where threads and loader processes are
micro_batch.py  the micro-batch that `batch.micro: auto` found
"""
