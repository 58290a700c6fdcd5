"""Diffusers pipeline folders as the models that a fit runs."""
