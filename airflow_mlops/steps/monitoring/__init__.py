"""What the checks of a model in use share: labels, estimates, the two sides of a comparison."""
