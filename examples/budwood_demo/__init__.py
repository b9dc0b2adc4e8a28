"""A small, complete Budwood demonstration: a tiny base model, a data set and what is made of them."""
