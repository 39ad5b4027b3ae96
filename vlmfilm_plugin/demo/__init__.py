"""The demo: a synthetic task that needs the condition, and a small host that is run exactly as it is."""
