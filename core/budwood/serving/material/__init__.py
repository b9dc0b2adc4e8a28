"""Adapters as material: combined, shrunk and compared."""
