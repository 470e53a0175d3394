"""What `distrain.checkpoint` is made of. Imports no torch.

format.py     what is in a checkpoint, and its manifest
writing.py    save, publish, retire
reading.py    find, verify, read
comparing.py  how two checkpoints differ
dtypes.py     every dtype: torch's name, safetensors' name, its size
floats.py     floating-point numbers of one width as another
export/       a checkpoint as one file, and files as a checkpoint
foreign/      the folders and files that others write
"""
