"""What a strategy sees: the hooks, the objects they receive, the Strategy class and the registry."""
