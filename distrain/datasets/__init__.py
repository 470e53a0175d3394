"""Data sets by name.

base.py        what a batch is, what a data set gives, and the registry
embedded.py    small real data that comes with scikit-learn, for first runs and tests; sklearn_files.py reads its files
images.py      folders of images, and CIFAR and MNIST as they are distributed
tables.py      CSV and Parquet: rows -> inputs and targets; table_files.py reads them, table_numbers.py has the
               numbers of a column, table_columns.py what is learnt of columns from the training rows
text.py        text for language models
parallel.py    pairs of sentences for translation
batches.py     from sample numbers to batches; what does not decode
user.py        the user's own Dataset or iterable, named in the recipe
labels.py      what targets may be
transforms/    what is done to inputs, in whole batches
randomness.py  random numbers computed from (seed, epoch, sample id)
loading.py     loader processes: how a batch leaves one, and what is said when none comes
tokens.py      text as token ids in a file that is mapped into memory
"""
