"""What the project claims, one command each, beside its peers in the same run."""
