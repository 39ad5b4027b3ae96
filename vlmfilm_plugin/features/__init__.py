"""Features of images: how an image is named, read, encoded and stored. Knows neither FiLM nor hosts."""
