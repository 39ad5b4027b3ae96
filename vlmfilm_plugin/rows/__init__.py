"""The row ledger: which item of which data set, and which file, each row of a tensor is."""
