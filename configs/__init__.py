"""One YAML file per (pipeline, model)."""
