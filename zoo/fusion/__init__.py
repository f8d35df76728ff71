"""Ways of making one model of several: their weights, their features or their outputs."""
