"""Host adapters, one file a host family. They describe a host and import neither it nor torch."""
