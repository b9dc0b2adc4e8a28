"""Tasks on images: their classes, and their masked patches.

Importing the package loads neither torch nor transformers, so that data is read before them.
"""
