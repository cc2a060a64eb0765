"""How a rollout is carried out, look by look."""
