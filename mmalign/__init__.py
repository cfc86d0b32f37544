"""Align image generators and vision-language models with preferences and rewards."""
