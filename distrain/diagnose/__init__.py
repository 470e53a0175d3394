"""How a run explains what goes wrong.

hang_diagnosis/    which rank hangs, and where
memory_advice.py   what to lower where the memory does not suffice
index_errors.py    the sample and column of a label or token out of range
"""
