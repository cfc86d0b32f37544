"""Configurations of `accelerate launch`: one per way to share a model among processes."""
