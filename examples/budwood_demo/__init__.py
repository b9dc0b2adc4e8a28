"""A small, complete demo of Budwood: a tiny base model, a data set, and recipes."""
