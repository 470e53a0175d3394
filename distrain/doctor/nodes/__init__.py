"""`distrain doctor --nodes N`: what is wrong between the nodes of a job.

    job.py        queues a job, or starts a step of the one that this process is in, and reads what its nodes print
    __main__.py   what srun starts on each node: `node.py`, which starts the ranks, and then checks the machine
    rank.py       what each rank does together with the others, in order; of meeting.py, shared.py, exchange.py
    lines.py      how nodes tell what they have found: by lines that they print, which need nothing between them
    comparing.py  what nodes say of themselves -> findings           pure
    judging.py    what ranks have measured together -> findings      pure

Imports no torch, but for what ranks run.
"""
