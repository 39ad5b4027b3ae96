"""FiLM in checkpoints and weight files. Knows neither features nor hosts."""
