"""The parts of `distrain.checkpoint`. Imports no torch.

format.py     the contents of a checkpoint, and its manifest
writing.py    save, publish, retire
hiding.py     names of what is being written or deleted
reading.py    find, verify, read
files.py      opens files and hashes them
headers.py    the headers of safetensors files
rank_files.py what the file of each rank holds
sources.py    where the tensors of a checkpoint of any format lie
comparing.py  how two checkpoints differ
dtypes.py     every dtype: torch's name, safetensors' name, its size
floats.py     floating-point elements of one width to another
export/       a checkpoint to files, and files to a checkpoint
foreign/      the formats of other trainers
"""
