"""A recipe before it runs."""
