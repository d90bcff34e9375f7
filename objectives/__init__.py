"""What the logits mean: the training objectives, and what each gives samplers to call."""
