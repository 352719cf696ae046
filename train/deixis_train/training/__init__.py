"""The training engine: recipes, one loop for every stage, cached features. `deixis train` is its command line."""
