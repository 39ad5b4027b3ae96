"""A small stand-in for the official MedSegDiff: the same module paths and signatures, nothing else of it."""
