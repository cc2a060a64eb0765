"""What a trained model is: its inputs, package, seal, card and explanation."""
