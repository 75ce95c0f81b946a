"""Publishing side: Megatron LoRA to expert-indexed shards, and the commit that makes them a version."""
