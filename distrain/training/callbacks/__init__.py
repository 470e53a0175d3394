"""`Callback`, by which a run calls code of one's own, and the built-in callbacks.

base.py             `Callback`, what it sees of a run and may do there
building.py         the callbacks that a recipe names, checked and made
built_in.py         the built-in ones, in their order
dispatch.py         they are called on all ranks; a failure or a request of one is everybody's
banner.py           what a run shows of itself before its first step
train_log.py        the row of training numbers every so many steps
trackers.py         metrics.jsonl, the progress line, and the trackers that get its rows
tracker.py          `Tracker`, which mirrors rows
boards.py           wandb and TensorBoard
services.py         MLflow and trackio
offline_runs.py     folders of an offline wandb run, one for each attempt
corrupt_samples.py  samples that do not decode, noted once each
early_stopping.py   training ends where evaluations bring no improvement
trace.py            what each step did, for `distrain prove`
reused.py           callback objects that are given to several runs of one process
hidden_state.py     state of the process that no checkpoint holds
outside_files.py    files outside the run folder that the process writes
"""
