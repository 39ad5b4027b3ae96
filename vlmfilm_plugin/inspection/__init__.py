"""Look at a UNet by one forward: its decoder, with real shapes, for whoever writes a host adapter."""
