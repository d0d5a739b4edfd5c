"""Families of models: a file for each architecture, with all that differs between them."""
