"""The feature store: the protocol, SQLite behind it, administration, exchange. No torch."""
