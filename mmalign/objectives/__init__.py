"""Objectives: pure functions from tensors and hyper-parameters to losses and metrics."""
