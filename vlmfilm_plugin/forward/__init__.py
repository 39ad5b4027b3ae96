"""One UNet forward: its condition, the hooks that apply it, attachment. Knows neither hosts nor runs."""
