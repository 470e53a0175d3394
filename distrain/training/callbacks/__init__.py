"""What watches a run and writes down what it sees.

base.py           `Callback`, what it sees of a run and may do there
building.py       the callbacks that a recipe names, checked and made
dispatch.py       they are called on all ranks; a failure or a request of one is everybody's
banner.py         what a run says of itself before its first step
offline_runs.py   folders of an offline wandb run, one for each start
train_log.py      the row of training numbers every so many steps
trackers.py       metrics.jsonl, the progress line, wandb and TensorBoard
trace.py          what each step did, for `distrain prove`
hidden_state.py   state of the process that no checkpoint holds
outside_files.py  files outside the run folder that the process writes
"""
