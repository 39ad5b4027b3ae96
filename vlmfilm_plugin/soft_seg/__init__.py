"""The soft-seg port's own interface, for models that call it by hand."""
