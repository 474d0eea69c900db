"""The QLoRA trainer: adapt a large language model on one consumer GPU. See DESIGN in README.md."""
