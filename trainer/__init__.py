"""Training side: Megatron-Core model with our LoRA, GRPO, and the training loop."""
