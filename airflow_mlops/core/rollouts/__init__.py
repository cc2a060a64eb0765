"""How a version comes into use: the state machine, its looks and what a service is to serve."""
