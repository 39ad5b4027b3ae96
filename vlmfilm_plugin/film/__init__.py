"""FiLM: heads and projections, the module a UNet holds, what decides the shape of its weights. Knows neither encoders nor hosts."""
