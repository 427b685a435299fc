"""What only the matrix kind has: parameters told apart, batches of matrices, two rules in one step."""
