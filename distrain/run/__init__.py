"""What a run leaves on the disk. Imports no torch and knows no launcher.

folder.py       the run folder: recipe, launch.json, markers of how it ended
json_files.py   JSON on disk: files replaced atomically, files of rows
metrics_file.py metrics.jsonl as it is written: each row once
media.py        pictures, tables and texts that rows name
evaluations.py  the evaluations of a run, read while it writes them
lease.py        which attempt may write
attempts.py     how far an attempt came, and what its seconds went to
energy.py       the energy of this process's GPU
heartbeat.py    what each rank does, for whoever looks from outside
stacks.py       where threads and loader processes are
micro_batch.py  the micro-batch that `batch.micro: auto` found
"""
