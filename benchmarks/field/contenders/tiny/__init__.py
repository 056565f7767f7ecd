"""What users write to tune a language model."""
