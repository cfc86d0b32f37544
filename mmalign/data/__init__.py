"""Preference pairs: from any format on disk to batches for a denoiser."""
