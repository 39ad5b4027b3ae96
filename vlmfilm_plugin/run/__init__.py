"""A host's run: settings, features and condition of each batch, log lines. Does not know how hosts are patched."""
