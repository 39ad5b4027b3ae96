"""Settings: their record, how values are written, which source wins. Knows neither torch nor hosts."""
