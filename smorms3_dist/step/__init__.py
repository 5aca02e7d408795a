"""One step: what ranks agree on before it, the way it takes, and its order."""
