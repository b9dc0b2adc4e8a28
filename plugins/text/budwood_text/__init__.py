"""Further tasks on text: tags of tokens, numbers, masked tokens, and sequences from sequences.

Importing the package loads no torch, so that data is read before it.
"""
