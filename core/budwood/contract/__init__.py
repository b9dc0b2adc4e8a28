"""The interface to strategies: hooks, the objects they receive, the Strategy class and the registry."""
