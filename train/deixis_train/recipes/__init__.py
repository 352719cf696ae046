"""The shipped recipes, one TOML file each; `training.recipe` says what may stand in them."""
