"""Architectures and the Lightning modules that train them."""
