"""What a tier is: where its weights come from, how they are quantized, and the engine that runs them."""
