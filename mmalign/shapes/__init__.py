"""Shapes world: a small, complete world in which every picture can be checked exactly."""
