"""From a recipe to an adapter: the recipe, the step, the loop, and what a run reports."""
