"""What the JAX and the Pallas layer share."""
