"""Hosts: activation, recognition and patching. Knows no host by name."""
