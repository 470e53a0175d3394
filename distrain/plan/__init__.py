"""What a run will take before it is started: memory, time, and which strategy fits. See docs/plan.md.

gpus.py      GPUs by name, and from a file
facts.py     what a plan is made of: parameters, and a pass over a micro-batch
tracing.py   finds these out, without values
traffic.py   the bytes that ranks send each other
memory.py    `plan_memory`: the memory of a process under each strategy
timing.py    the time of a step
planning.py  `make_plan`: all of it for a recipe, with a recommendation
showing.py   a plan as text and as JSON
"""
