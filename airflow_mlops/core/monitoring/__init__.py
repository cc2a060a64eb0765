"""What a model in use is watched by: drift, realized and estimated performance, incidents."""
