"""jaxrm: train, merge, evaluate and serve reward models in JAX."""
