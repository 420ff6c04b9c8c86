"""What runs inside JAX transformations."""
