"""What a model is worth: losses and metrics, generated text, pictures."""
