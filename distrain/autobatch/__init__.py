"""The largest micro-batch that fits.

search.py  tries sizes in processes of their own
"""
