"""What the project claims, one command each, next to its peers in the same run."""
