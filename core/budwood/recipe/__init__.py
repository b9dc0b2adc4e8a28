"""The recipe: schema, YAML with line numbers, overrides, reference page."""
