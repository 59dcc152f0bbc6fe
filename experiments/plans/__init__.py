"""What `experiments.plan` computes: chips, lowered steps, what they need."""
