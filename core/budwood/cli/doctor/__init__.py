"""`budwood doctor`."""
