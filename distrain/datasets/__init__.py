"""Data sets by name.

base.py         batches, data sets and splits
embedded.py     small real data sets that come with scikit-learn; sklearn_files.py reads their files
images.py       folders of images; CIFAR and MNIST. image_layouts.py finds how a folder is laid out
image_masks.py  images with a mask of classes each
tables.py       CSV, JSON Lines, Parquet: rows -> inputs and targets. table_files.py reads the files, table_columns.py
                fits columns to the training rows, table_numbers.py computes means and deviations
text.py         text for language models; tokens.py maps token ids from files
chat.py         conversations for language models: conversations.py reads the files, chat_template.py makes tokens of
                them, packing.py puts several into a row, ragged.py keeps what is encoded; preference.py has pairs of
                answers
labelled_text.py  texts with classes or numbers, by a tokenizer
tagged_text.py  sentences with a tag for each token: tagged_files.py reads them, tags.py knows what marks entities
parallel.py     pairs of sentences for translation
user.py         the user's own Dataset or iterable; user_items.py makes batches of its items, arrays.py has arrays that
                are given in Python
nested.py       values of a batch, nested as a sample is
labels.py       the allowed targets; class_counts.py counts them
describing.py   what the first samples show; stored_meta.py keeps such facts in checkpoints
order.py        the order of samples, computed from the step; streams.py has those of a stream
mixing.py       MixUp and CutMix
randomness.py   random numbers computed from (seed, epoch, sample id)
transforms/     transforms of inputs, in whole batches
batches.py      from sample numbers to batches; corrupt samples
loading.py      loader processes; waiting.py reports a batch that does not come
evaluation.py   one pass over a split
batch_sizes.py  micro-batches and accumulation
preparing.py    data.prepare
"""
