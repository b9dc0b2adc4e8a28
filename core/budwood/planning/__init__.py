"""Plans a recipe before it runs."""
