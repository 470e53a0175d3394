"""What `distrain.loop` is made of.

context.py          what a step needs, and what comes of one
setup.py            data, model and optimizer are built, and the checkpoint to resume from is restored
pipeline.py         what one rank reads of the training data
fitting.py          the model on its way to a strategy, while it is whole
tasks/              what a batch means: losses, predictions, means
documents.py        whether a model keeps the documents of a packed row apart
restored.py         the model of a checkpoint, built and filled
run_loop.py         `Session`: what `train` does between its steps
loop_state.py       what an attempt is made of, and what changes between its steps
evaluator.py        when an evaluation is due, what comes of it, and which was best
saving.py           when a checkpoint is due, what is in it, and restoring one
ending.py           the run is left to be resumed, or its model exported
evaluation.py       `evaluate`: every sample once
samples.py          a few samples with what the model predicts for them
outputs.py          what a model predicts, from its outputs
intervals.py        when things are due, requests to stop, the best so far
skipping.py         steps that are skipped: the loss or gradient norm is NaN, infinite, or spikes
coupling.py         losses that couple the samples of a batch, found before step 1
noise.py            random numbers of a sample, the same in any world
ranking.py          what the best checkpoint is the best of
forward.py          what layers know of the batch they are called on
checks.py           what a recipe must be before anything is built from it
updates.py          what changed since the checkpoint: data, code, recipe
callbacks/          `Callback`, and the built-in ones: logs, trackers, early stopping, the trace of a proof
"""
