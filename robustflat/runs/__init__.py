"""What is done with finished runs: evaluated, measured, compared."""
