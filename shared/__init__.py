"""What every side agrees on: errors, configuration, store, manifest, adapter files. No torch, no vllm."""
